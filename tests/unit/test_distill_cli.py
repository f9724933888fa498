"""The verbs in the order that a user types them, over a teacher of a few thousand parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from sparkray.cli.main import app
from sparkray.distill.data.sources import toy_documents
from sparkray.distill.gates import Gate, check_gates
from sparkray.distill.generate import beam_search, sample_stream
from sparkray.distill.run import load_student
from sparkray.errors import SparkrayError, UsageError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_teacher(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([document.text for document in toy_documents()], trainer)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Shell:
    """A folder in which verbs are run; all of them with the same small settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "small.yaml"
        self.settings.write_text(
            json.dumps(
                {
                    "teacher": {"model": str(write_teacher(folder / "teacher"))},
                    "pack": {"sequence_tokens": 64, "max_sequences": 12},
                    "store": {"top_logprobs": 8, "tail_draws": 2, "shard_sequences": 5},
                    "student": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16},
                    "train": {"num_steps": 4, "batch_sequences": 4, "checkpoint_steps": 2, "validation_sequences": 2},
                    "autoencoder": {"hidden_size": 16, "latent_size": 8, "num_steps": 4, "batch_chunks": 8},
                    "latent": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16},
                }
            )
        )

    def run(self, *arguments: str, fails_with: type[SparkrayError] | int | None = None) -> dict[str, Any]:
        words = ["distill", *(word.replace("@", f"{self.folder}/") for word in arguments), "--json"]
        if arguments[0] not in ("toy", "infer"):
            words += ["--config", str(self.settings)]
        done = CliRunner().invoke(app, words)
        if isinstance(fails_with, type):
            assert isinstance(done.exception, fails_with), done.output
            return {"message": str(done.exception)}
        assert done.exit_code == (fails_with or 0), (done.output, done.exception)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    made = Shell(tmp_path_factory.mktemp("distill"))
    made.run("toy", "@toy.jsonl")
    made.run("pack", "@toy.jsonl", "@pack")
    made.run("store", "@pack", "@store")
    made.run("train", "@pack", "@run", "--store", "@store")
    return made


def test_each_stage_says_what_it_made(shell: Shell) -> None:
    assert shell.run("toy", "@toy.jsonl")["num_documents"] == 24
    packed = shell.run("pack", "@toy.jsonl", "@pack")
    assert packed["num_train_sequences"] == 12
    assert packed["num_train_tokens"] == 12 * 64
    stored = shell.run("store", "@pack", "@store")
    assert (stored["num_shards"], stored["num_tokens"]) == (3, 768)
    trained = shell.run("train", "@pack", "@run", "--store", "@store")
    # The run was finished by the fixture, so nothing is left to do.
    assert trained["num_steps_now"] == 0
    rows = [json.loads(line) for line in (shell.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all("validation" in row for row in rows if "loss" not in row)


def test_live_rows_give_the_stores_losses_and_the_cache_the_same_again(shell: Shell) -> None:
    # The store keeps float16; the live teacher and the cache keep float32 and agree to the bit.
    cached = ("--set", f"cache.path={shell.folder}/cache.sqlite")
    live = shell.run("train", "@pack", "@live", "--live", *cached, "--set", "client.top_logprobs=8", *_reduced())
    again = shell.run("train", "@pack", "@again", "--live", *cached, "--set", "client.top_logprobs=8", *_reduced())
    assert live["client"]["num_from_teacher"] == 12
    assert again["client"]["hit_rate"] == 1.0
    losses = [
        [row["loss"] for row in map(json.loads, (shell.folder / out / "metrics.jsonl").open()) if "loss" in row]
        for out in ("live", "again", "run")
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    assert (
        shell.run("train", "@pack", "@again2", "--live", *cached, "--kd-cache-ro", *_reduced())["client"]["hit_rate"]
        == 1
    )


def test_a_hit_rate_that_is_too_low_or_unknown_fails_the_run(shell: Shell) -> None:
    cached = ("--set", f"cache.path={shell.folder}/gated.sqlite", *_reduced(), "--min-hit-rate", "0.99")
    first = shell.run("train", "@pack", "@gated", "--live", *cached, fails_with=1)
    assert first["broken_gates"] == ["hit_rate is 0.25, and at_least 0.99 is asked for"]
    assert shell.run("train", "@pack", "@gated2", "--live", *cached)["broken_gates"] == []
    unknown = shell.run("train", "@pack", "@stored", "--store", "@store", "--min-hit-rate", "0", fails_with=1)
    assert unknown["broken_gates"] == ["hit_rate was not measured (None), and at_least 0 is asked for"]


def _reduced() -> tuple[str, ...]:
    return ("--set", "client.reduced_top_logprobs=8")


def test_what_cannot_be_is_refused(shell: Shell) -> None:
    told = shell.run("train", "@pack", "@none", fails_with=UsageError)["message"]
    assert "without a teacher's rows" in told
    told = shell.run("train", "@pack", "@none", "--store", "@store", "--live", fails_with=UsageError)["message"]
    assert "both given" in told
    told = shell.run("train", "@pack", "@run", "--store", "@store", "--set", "train.seed=5", fails_with=UsageError)
    assert "another run: train differ" in told["message"]


def test_the_student_writes_and_is_measured(shell: Shell) -> None:
    words = ("infer", "@run/model", "--prompt", "The assert", "--max-tokens", "5", "--temperature", "1")
    first = shell.run(*words)
    assert first == shell.run(*words)
    assert first["num_tokens"] <= 5
    assert len(shell.run("infer", "@run/model", "--prompt", "The", "--beams", "3", "--max-tokens", "4")["beams"]) == 3
    report = shell.run("bench", "@pack", "@run/model", "--max-kl", "50")
    assert report["broken_gates"] == []
    assert 0 < report["kl_to_teacher"] < 50
    assert report["num_tokens_written"] == 64
    report = shell.run("bench", "@pack", "@run/model", "--max-kl", "0.0001", fails_with=1)
    assert "kl_to_teacher is" in report["broken_gates"][0]


def test_the_latent_pair_runs(shell: Shell) -> None:
    made = shell.run("train-ae", "@pack", "@ae")
    assert 0 <= made["validation_exact_match"] <= 1
    trained = shell.run("train", "@pack", "@latent", "--autoencoder", "@ae", "--store", "@store", *_latent_weights())
    assert trained["validation"]["num_chunks"] > 0
    words = ("infer", "@latent/model", "--prompt", "The assert", "--max-tokens", "6", "--temperature", "0.5")
    written = shell.run(*words)
    assert written == shell.run(*words)
    assert written["num_tokens"] <= 6
    told = shell.run("train", "@pack", "@latent2", "--autoencoder", "@ae", *_latent_weights(), fails_with=UsageError)
    assert "without a store" in told["message"]


def _latent_weights() -> tuple[str, ...]:
    return ("--set", "latent.kd_weight=0.5", "--set", "latent.ce_weight=0.5")


def test_gates_fail_closed() -> None:
    gates = [Gate("a", 1.0, "at_most"), Gate("b", 1.0, "at_least"), Gate("c", None, "at_most")]
    assert check_gates({"a": 1.0, "b": 1.0}, gates) == []
    assert len(check_gates({"a": 1.1, "b": 0.9}, gates)) == 2
    assert "was not measured" in check_gates({"a": None, "b": 2}, gates)[0]
    assert "was not measured" in check_gates({"a": float("nan"), "b": 2}, gates)[0]


def test_beams_find_the_likeliest_text(shell: Shell) -> None:
    student = load_student(shell.folder / "run" / "model")
    found = beam_search(student, [5], max_tokens=2, num_beams=300, end_id=0)
    first_V = student.logits(torch.tensor([[5]]))[0, -1].log_softmax(-1)
    totals = [float(first_V[0])]  # a text that ends at once
    for token in range(1, 300):
        second_V = student.logits(torch.tensor([[5, token]]))[0, -1].log_softmax(-1)
        totals.append(float(first_V[token] + second_V.max()))
    assert found[0].logprob == pytest.approx(max(totals), rel=1e-4)
    greedy = list(sample_stream(student, [5], max_tokens=3, temperature=0, top_p=1, end_id=-1, seed=0))
    assert greedy[0] == int(first_V.argmax())
