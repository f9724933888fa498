"""The teacher that the settings describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkray.config.distill import ClientConfig, StoreConfig, TeacherConfig
from sparkray.distill.alignment.fingerprint import load_tokenizer, tokenizer_folder, tokenizer_sha256
from sparkray.distill.alignment.pieces import vocabulary_pieces
from sparkray.distill.teachers.base import Teacher
from sparkray.errors import UsageError
from sparkray.models import prepare_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def create_teacher(config: TeacherConfig, store: StoreConfig, client: ClientConfig) -> Teacher:
    """Load or connect to the teacher.

    Raises:
        NotFoundError: no such model or tokenizer.
        InputError: a vLLM server that cuts text differently from the tokenizer given.
        TeacherDownError: a served teacher that does not answer.
        UsageError: a temperature for a teacher that gives its numbers at 1 only.
    """
    tokenizer = teacher_tokenizer(config)
    identity = tokenizer_sha256(tokenizer)
    if config.kind == "transformers":
        from sparkray.distill.teachers.forward import ForwardTeacher

        return ForwardTeacher(prepare_model(config.model), config, store, identity)
    if store.temperature != 1.0:
        raise UsageError(
            f"store.temperature={store.temperature:g} was set, and a teacher of kind={config.kind!r} gives its"
            " log-probabilities at temperature 1.",
            hint="Set loss.temperature instead; with target='tail_bucket' it is derived from them.",
            param="store.temperature",
        )
    if config.kind == "vllm_local":
        from sparkray.distill.teachers.vllm_local import VllmTeacher

        return VllmTeacher(prepare_model(config.model), config, max(store.top_logprobs, client.top_logprobs), identity)
    from sparkray.distill.teachers.api import ApiTeacher

    engine = ""
    if config.kind == "vllm_remote":
        from sparkray.distill.teachers.handshake import handshake

        engine = handshake(str(config.base_url), config.model, tokenizer, client.request_timeout_seconds)
    return ApiTeacher(
        config,
        vocabulary_pieces(tokenizer),
        identity,
        request_timeout_seconds=client.request_timeout_seconds,
        engine=engine,
    )


def teacher_tokenizer(config: TeacherConfig) -> Tokenizer:
    """The teacher's tokenizer: `config.tokenizer`, else the model's own.

    Raises:
        UsageError: a served teacher without a tokenizer at hand.
    """
    if config.tokenizer is None and config.kind in ("vllm_remote", "api"):
        raise UsageError(
            f"teacher.kind={config.kind!r} was set without teacher.tokenizer, and a host does not ship its tokenizer.",
            hint="Give a folder with the tokenizer.json of the model that is served, or `embedded`.",
            param="teacher.tokenizer",
        )
    return load_tokenizer(tokenizer_folder(config.tokenizer or config.model))
