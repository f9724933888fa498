"""The stages of a distillation, as the command line and the job run them: pack, store, train, evaluate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparkray.config.distill import DistillConfig
from sparkray.distill.alignment.fingerprint import (
    load_tokenizer,
    require_same_tokenizer,
    tokenizer_folder,
    tokenizer_sha256,
)
from sparkray.distill.alignment.pieces import vocabulary_pieces
from sparkray.distill.alignment.teacher import AlignedTeacher
from sparkray.distill.cache.file import ScoreCache
from sparkray.distill.client.client import TeacherClient
from sparkray.distill.data.pack import Pack, pack_documents, read_pack, write_pack
from sparkray.distill.data.sources import read_documents
from sparkray.distill.scores import TokenScores
from sparkray.distill.store.capture import capture_store, sequence_scorer, store_header
from sparkray.distill.store.manifest import Manifest
from sparkray.distill.store.reader import LogitStore
from sparkray.distill.students.causal import CausalStudent, create_causal_student
from sparkray.distill.students.latent import LatentStudent
from sparkray.distill.teachers.base import Teacher
from sparkray.distill.teachers.create import create_teacher, teacher_tokenizer
from sparkray.distill.training.autoencoder import aligned_chunks, load_autoencoder, save_autoencoder, train_autoencoder
from sparkray.distill.training.evaluate import Evaluation, evaluate
from sparkray.distill.training.latent_evaluate import evaluate_latent
from sparkray.distill.training.latent_files import save_latent
from sparkray.distill.training.objective import CausalObjective, LatentObjective, Objective
from sparkray.distill.training.on_policy import OnPolicyObjective, require_room
from sparkray.distill.training.supervision import DataOnly, FromClient, FromStore, Supervision
from sparkray.distill.training.trainer import StepReport, Trainer, Workers
from sparkray.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[int, int], None]
_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_HELD_OUT_CHUNKS = 512


def make_pack(source: str, out: Path, config: DistillConfig) -> Pack:
    """Pack documents with the teacher's tokenizer and write the pack.

    Raises:
        NotFoundError, InputError: no such text, or too little of it.
    """
    tokenizer = student_tokenizer(config)
    pack = pack_documents(
        read_documents(source),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        config.pack,
        end_id=end_token(tokenizer),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )
    write_pack(pack, out)
    return pack


def student_tokenizer(config: DistillConfig) -> Tokenizer:
    """The tokenizer of the pack: its own, or the teacher's."""
    if config.pack.tokenizer is None:
        return teacher_tokenizer(config.teacher)
    return load_tokenizer(tokenizer_folder(config.pack.tokenizer))


def teacher_of_pack(pack: Pack, config: DistillConfig) -> Teacher:
    """The teacher, answering in the pack's ids.

    Raises:
        InputError: another tokenizer than the pack's, with alignment off; or a pack of another tokenizer than
            `pack.tokenizer` names.
        UsageError: alignment with a target that its rows cannot give.
    """
    teacher = create_teacher(config.teacher, config.store, config.client)
    if teacher.identity.tokenizer_sha256 == pack.header.tokenizer_sha256 or config.alignment.method == "off":
        require_same_tokenizer(teacher.identity.tokenizer_sha256, pack.header.tokenizer_sha256)
        return teacher
    if config.loss.target != "tail_bucket":
        raise UsageError(
            f"loss.target={config.loss.target!r} was set, and aligned rows leave what has no counterpart to the tail.",
            hint="Set loss.target='tail_bucket'.",
            param="loss.target",
        )
    theirs, ours = teacher_tokenizer(config.teacher), student_tokenizer(config)
    require_same_tokenizer(tokenizer_sha256(ours), pack.header.tokenizer_sha256)
    return AlignedTeacher(
        teacher,
        lambda text: theirs.encode(text, add_special_tokens=False).ids,
        vocabulary_pieces(theirs),
        vocabulary_pieces(ours),
        (end_token(theirs), end_token(ours)),
        pack.header.tokenizer_sha256,
        min_mass_share=config.alignment.min_mass_share,
    )


def end_token(tokenizer: Tokenizer) -> int:
    """The token that ends a document.

    Raises:
        InputError: the tokenizer has none of the usual ones.
    """
    for token in _END_TOKENS:
        number: int | None = tokenizer.token_to_id(token)
        if number is not None:
            return number
    raise InputError(f"the tokenizer has none of {', '.join(_END_TOKENS)} to end a document with.")


def make_store(pack_folder: Path, out: Path, config: DistillConfig, progress: Progress) -> Manifest:
    """Score a pack's training part and keep the rows; goes on where a killed run was.

    Served teachers are asked through the client, with its bounds, pauses and cache.

    Raises:
        InputError: the teacher's tokenizer is not the pack's.
        UsageError: `out` is another store's.
    """
    pack = read_pack(pack_folder)
    teacher = teacher_of_pack(pack, config)
    header = store_header(pack, teacher.identity, config.store)
    if config.teacher.kind in ("transformers", "vllm_local"):
        with closing(teacher):  # its memory is the student's next
            scorer = sequence_scorer(teacher, config.store, config.teacher.overlap_tokens)
            return capture_store(out, pack, header, scorer, progress)
    with ScoreCache(config.cache) as cache, TeacherClient(teacher, config.client, cache) as client:
        return capture_store(out, pack, header, partial(score_all, client), progress)


def train_causal(
    pack_folder: Path,
    out: Path,
    config: DistillConfig,
    *,
    store_folder: Path | None,
    live: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> dict[str, Any]:
    """Train a causal student: from a store, from the live teacher, or on the data alone.

    Args:
        pack_folder: of the pack.
        out: checkpoints, metrics.jsonl and, at the end, `model/` as transformers loads it.
        config: settings.
        store_folder: of a finished store.
        live: ask the teacher of the settings while training.
        on_step: called after every step.

    Raises:
        UsageError: distillation without rows, rows that cannot give the target, or another run's folder.
    """
    pack = read_pack(pack_folder)
    check_training(pack, config, store_folder, live=live)
    device = training_device(config)
    with supervision(pack, config, store_folder, live=live) as (rows, client):
        trainer = causal_trainer(pack, config, store_folder, rows, device, client=client)
        student = trainer.student
        assert isinstance(student, CausalStudent)
        validation = list(range(min(config.train.validation_sequences, len(pack.validation))))

        def validate() -> dict[str, Any]:
            return evaluate(student, pack.validation, validation, None, device).to_json()

        reports = trainer.run(out, on_step, validate if validation else None)
        metrics = None if client is None else client.metrics.to_json()
    save_student(student, out / "model", config)
    return {
        "out": str(out),
        "num_steps": config.train.num_steps,
        "num_steps_now": len(reports),
        "num_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "loss": reports[-1].loss if reports else None,
        "cross_entropy": reports[-1].cross_entropy if reports else None,
        "distillation": reports[-1].distillation if reports else None,
        "waited_share": sum(r.waited_seconds for r in reports) / sum(r.seconds for r in reports) if reports else None,
        "client": metrics,
    }


def check_training(pack: Pack, config: DistillConfig, store_folder: Path | None, *, live: bool) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        UsageError: distillation without rows, or rows from two sides.
        NotFoundError, InputError: no such store, or one of another corpus.
    """
    if store_folder is not None and live:
        raise UsageError("a store and the live teacher were both given, and one of them gives the rows.", param="store")
    if config.loss.kd_weight and store_folder is None and not live:
        raise UsageError(
            f"loss.kd_weight={config.loss.kd_weight:g} was set without a teacher's rows.",
            hint="Give --store FOLDER or --live, or set loss.kd_weight=0 to learn from the data alone.",
            param="loss.kd_weight",
        )
    if config.on_policy.share and not live:
        raise UsageError(
            f"on_policy.share={config.on_policy.share:g} was set, and only a live teacher can score what the student"
            " writes.",
            hint="Give --live in place of --store.",
            param="on_policy.share",
        )
    require_room(config.on_policy, pack.header.sequence_tokens)
    if store_folder is not None:
        LogitStore(store_folder, pack)


@contextmanager
def supervision(
    pack: Pack, config: DistillConfig, store_folder: Path | None, *, live: bool
) -> Iterator[tuple[Supervision, TeacherClient | None]]:
    """Where the rows of a run come from, and the client if the teacher is asked while training."""
    if store_folder is not None:
        yield FromStore(LogitStore(store_folder, pack).__getitem__), None
    elif live:
        teacher = teacher_of_pack(pack, config)
        with ScoreCache(config.cache) as cache, TeacherClient(teacher, config.client, cache) as client:
            yield FromClient(client, pack.train.tokens), client
    else:
        yield DataOnly(), None


def causal_trainer(
    pack: Pack,
    config: DistillConfig,
    store_folder: Path | None,
    rows: Supervision,
    device: torch.device,
    workers: Workers | None = None,
    *,
    client: TeacherClient | None = None,
) -> Trainer:
    """The trainer of a causal student, as one worker or alone; `client` scores what the student writes itself."""
    student = create_causal_student(
        config.student,
        vocab_size=pack.header.vocab_size,
        max_tokens=pack.header.sequence_tokens,
        seed=config.train.seed,
        activation_checkpointing=config.train.activation_checkpointing,
    ).to(device)
    run = run_identity(pack, config, store_folder)
    objective: Objective = CausalObjective(config.loss)
    if config.on_policy.share and client is not None:
        objective = OnPolicyObjective(config.loss, config.on_policy, partial(score_all, client))
    return Trainer(student, pack, rows, objective, config.train, run, workers)


def score_all(client: TeacherClient, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
    """Rows of some sequences, asked for together."""
    return [future.result().scores for future in [client.submit(tokens) for tokens in sequences]]


def train_latent_autoencoder(
    pack_folder: Path, out: Path, config: DistillConfig, on_step: Callable[[int, float], None]
) -> dict[str, Any]:
    """Train the latent student's autoencoder; how much of held-out text comes back whole."""
    pack = read_pack(pack_folder)
    device = training_device(config)
    model = train_autoencoder(pack, config.autoencoder, device, on_step)
    save_autoencoder(model, out, pack.header.tokenizer_sha256)
    report: dict[str, Any] = {"out": str(out)}
    for name, part in (("train", pack.train), ("validation", pack.validation)):
        chunks_NK = aligned_chunks(part, config.autoencoder.chunk_tokens)[:_HELD_OUT_CHUNKS].to(device)
        report[f"{name}_exact_match"] = model.exact_match(chunks_NK) if len(chunks_NK) else None
    return report


def train_latent(
    pack_folder: Path,
    out: Path,
    config: DistillConfig,
    *,
    autoencoder_folder: Path,
    store_folder: Path | None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> dict[str, Any]:
    """Train the latent student over a trained autoencoder.

    Raises:
        UsageError: a weight on the teacher without a store, or another run's folder.
        InputError: chunks that do not divide the pack's sequences.
    """
    pack = read_pack(pack_folder)
    device = training_device(config)
    autoencoder = load_autoencoder(autoencoder_folder, pack.header.tokenizer_sha256)
    chunk = autoencoder.config.chunk_tokens
    if pack.header.sequence_tokens % chunk:
        raise InputError(
            f"the pack's sequences of {pack.header.sequence_tokens} tokens are no whole chunks of {chunk}."
        )
    if config.latent.kd_weight and store_folder is None:
        raise UsageError(
            f"latent.kd_weight={config.latent.kd_weight:g} was set without a store.", hint="Give --store FOLDER."
        )
    torch.manual_seed(config.train.seed)
    max_chunks = pack.header.sequence_tokens // chunk
    log_shares_V = torch.from_numpy(pack.train.log_shares(pack.header.vocab_size))
    student = LatentStudent(config.latent, autoencoder, max_chunks, log_shares_V).to(device)
    supervision = DataOnly() if store_folder is None else FromStore(LogitStore(store_folder, pack).__getitem__)
    validation = list(range(min(config.train.validation_sequences, len(pack.validation))))

    def validate() -> dict[str, Any]:
        return evaluate_latent(student, pack.validation, validation, 2, config.train.seed).to_json()

    trainer = Trainer(
        student,
        pack,
        supervision,
        LatentObjective(config.latent, config.loss, chunk),
        config.train,
        run_identity(pack, config, store_folder),
    )
    reports = trainer.run(out, on_step, validate if validation else None)
    save_latent(student, out / "model", max_chunks=max_chunks, tokenizer_sha256=pack.header.tokenizer_sha256)
    _copy_tokenizer(out / "model", config)
    return {
        "out": str(out),
        "num_steps": config.train.num_steps,
        "energy": reports[-1].cross_entropy if reports else None,
        "validation": validate() if validation else None,
    }


def evaluate_student(pack_folder: Path, model_folder: Path, config: DistillConfig) -> Evaluation:
    """A trained causal student on held-out text, against data and a transformers teacher's full vocabulary.

    Raises:
        UsageError: a teacher that does not show its full vocabulary.
    """
    if config.teacher.kind != "transformers":
        raise UsageError(
            f"teacher.kind={config.teacher.kind!r} was set, and the divergence is taken over the full vocabulary, which"
            " only kind='transformers' shows.",
            param="teacher.kind",
        )
    from sparkray.distill.teachers.forward import ForwardTeacher

    pack = read_pack(pack_folder)
    teacher = create_teacher(config.teacher, config.store, config.client)
    assert isinstance(teacher, ForwardTeacher)
    require_same_tokenizer(teacher.identity.tokenizer_sha256, pack.header.tokenizer_sha256)
    device = training_device(config)
    student = load_student(model_folder).to(device)
    numbers = range(min(config.train.validation_sequences, len(pack.validation)))

    @lru_cache(maxsize=2)
    def logits(number: int) -> Tensor:
        return teacher.logits(pack.validation.tokens(number)).cpu()

    return evaluate(student, pack.validation, numbers, logits, device)


def save_student(student: CausalStudent, folder: Path, config: DistillConfig) -> None:
    """Weights, configuration and tokenizer in one folder that transformers and vLLM load."""
    student.save(folder)
    _copy_tokenizer(folder, config)


def load_student(folder: Path) -> CausalStudent:
    """A causal student from the folder that `save_student` wrote.

    Raises:
        NotFoundError: the folder holds no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    load_tokenizer(folder)
    return CausalStudent(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _copy_tokenizer(folder: Path, config: DistillConfig) -> None:
    name = config.pack.tokenizer or config.teacher.tokenizer or config.teacher.model
    for path in sorted(tokenizer_folder(name).glob("tokenizer*.json")):
        (folder / path.name).write_bytes(path.read_bytes())


def run_identity(pack: Pack, config: DistillConfig, store_folder: Path | None) -> dict[str, Any]:
    """What a run is: a checkpoint is resumed by the same one only."""
    store = None
    if store_folder is not None:
        store = hashlib.sha256((store_folder / "manifest.json").read_bytes()).hexdigest()
    described = config.model_dump(mode="json", exclude={"client", "cache"})
    return {"pack": pack.header.data_sha256, "store": store} | {
        key: json.loads(json.dumps(value)) for key, value in described.items()
    }


def training_device(config: DistillConfig) -> torch.device:
    """The device of the settings; `auto` is CUDA where there is one."""
    chosen = config.train.device
    if chosen == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(chosen)
