"""A transformers model as teacher: its rows are its own logits', whatever the chunks, and its key is its weights'."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from sparkray.config.distill import ClientConfig, StoreConfig, TeacherConfig
from sparkray.distill.alignment.fingerprint import load_tokenizer, tokenizer_sha256
from sparkray.distill.teachers import forward
from sparkray.distill.teachers.create import create_teacher
from sparkray.distill.teachers.forward import ForwardTeacher, weights_sha256
from sparkray.errors import UsageError


def write_model(folder: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher"), 0)


def test_rows_are_the_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_ROWS_AT_ONCE", 3)
    made = create_teacher(TeacherConfig(model=str(folder)), StoreConfig(top_logprobs=5, tail_draws=2), ClientConfig())
    assert isinstance(made, ForwardTeacher)
    tokens = [3, 14, 15, 9, 26, 5, 35, 8]
    with torch.inference_mode():
        expected = made.model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    scores = made.score(tokens, 5).checked(7)
    np.testing.assert_allclose(scores.head_logprobs_LK, expected.topk(5).values.numpy(), atol=1e-5)
    np.testing.assert_array_equal(scores.head_ids_LK, expected.topk(5).indices.numpy())
    rows = torch.arange(7)
    np.testing.assert_allclose(scores.token_logprobs_L, expected[rows, torch.tensor(tokens[1:])].numpy(), atol=1e-5)
    np.testing.assert_allclose(scores.entropy_L, -(expected.exp() * expected).sum(-1).numpy(), atol=1e-4)
    np.testing.assert_array_equal(made.score(tokens, 5).tail_ids_LM, scores.tail_ids_LM)
    assert made.identity.tokenizer_sha256 == tokenizer_sha256(Tokenizer.from_file(str(folder / "tokenizer.json")))
    assert (made.max_model_tokens, made.vocab_size) == (64, 50)


def test_the_key_of_weights_is_their_content(folder: Path, tmp_path: Path) -> None:
    same, other = write_model(tmp_path / "same", 0), write_model(tmp_path / "other", 1)
    assert weights_sha256(folder) == weights_sha256(same)
    assert weights_sha256(folder) != weights_sha256(other)


def test_a_served_teacher_needs_its_tokenizer_and_gives_temperature_one() -> None:
    served = TeacherConfig(kind="api", model="m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match=r"without teacher\.tokenizer"):
        create_teacher(served, StoreConfig(), ClientConfig())
    with pytest.raises(UsageError, match="needs base_url"):
        from sparkray.config.base import validate_settings

        validate_settings(TeacherConfig, {"kind": "api"})


def test_a_folder_with_a_tokenizer_alone_serves_a_served_teacher(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    served = TeacherConfig(kind="api", model="m", base_url="http://127.0.0.1:9/v1", tokenizer=str(tmp_path))
    with closing(create_teacher(served, StoreConfig(), ClientConfig())) as teacher:
        assert teacher.identity.tokenizer_sha256 == tokenizer_sha256(load_tokenizer(folder))


def test_a_temperature_that_a_host_cannot_give_is_refused(folder: Path) -> None:
    served = TeacherConfig(kind="api", model="m", base_url="http://127.0.0.1:9/v1", tokenizer=str(folder))
    with pytest.raises(UsageError, match="at temperature 1"):
        create_teacher(served, StoreConfig(temperature=2.0), ClientConfig())
