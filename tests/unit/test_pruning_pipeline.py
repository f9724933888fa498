"""From files to a pruned, checked checkpoint, through the command line; and the numbers of the check by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_moe import CONTEXT, VOCAB, read_inputs, write_inputs, write_tiny
from tiny_words import add_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparkray.cli.prune import app
from sparkray.config.pruning import CalibrationConfig, ValidateConfig
from sparkray.errors import InputError, NotFoundError, SparkrayError, UnavailableError, UsageError, exit_code
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import check_data
from sparkray.pruning.pipeline import load_data
from sparkray.pruning.tokenize import tokenizer_of
from sparkray.pruning.validate import CheckFailedError, Comparison, compare, require_bounds

TEXTS = [" ".join(f"w{(7 * row + column) % 90}" for column in range(12 + row)) for row in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen3_moe", max_shard_size="60KB")
    add_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.json"
    path.write_text(json.dumps(TEXTS))
    return path


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_one_command_prunes_checks_and_reports(model: Path, texts: Path, tmp_path: Path) -> None:
    report = run("experts", model, "--data", texts, "--ratio", 0.25, "--work", tmp_path, "--json")
    out = tmp_path / "pruned_models" / "reap-seed_42-0.25"
    assert Path(report["directory"]) == out
    assert report["num_bytes"] == sum(tensor.num_bytes for tensor in Checkpoint(out).tensors.values())
    assert json.loads((out / "reap_report.json").read_text())["check"] == report["check"]
    assert report["check"]["num_tokens"] == sum(len(text.split()) - 1 for text in TEXTS)
    assert (out / "tokenizer.json").is_file()
    again = run("experts", model, "--data", texts, "--ratio", 0.25, "--work", tmp_path, "--json")
    assert again["check"] == report["check"]
    gigabytes = (report["num_bytes"] + 10) / 1e9
    by_size = run(
        "experts", model, "--data", texts, "--target-gb", gigabytes, "--work", tmp_path, "--no-check", "--json"
    )
    assert by_size["plan"]["num_experts_after"] == 6


def test_the_job_does_what_the_command_does(model: Path, texts: Path, tmp_path: Path) -> None:
    whole = run("experts", model, "--data", texts, "--num-experts", 5, "--work", tmp_path / "w", "--json")
    job = Path(__file__).parents[2] / "jobs" / "prune_experts.py"
    flags = ["--model", model, "--data", texts, "--num-experts", 5, "--work", tmp_path / "j", "--no-on-ray", "--json"]
    command = [sys.executable, str(job), *map(str, flags), "--set", "plan.ratio=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["check"] == whole["check"]
    assert report["directory"] == whole["directory"].replace("/w/", "/j/")


def test_every_stage_alone_gives_the_same_checkpoint(model: Path, texts: Path, tmp_path: Path) -> None:
    whole = run("experts", model, "--data", texts, "--num-experts", 5, "--work", tmp_path / "w", "--no-check", "--json")
    run("observe", model, "--data", texts, "--work", tmp_path / "s", "--json")
    planned = run("plan", model, "--data", texts, "--num-experts", 5, "--work", tmp_path / "s", "--json")
    out = tmp_path / "out"
    dry = run("rewrite", model, "--plan", planned["plan"], "--out", out, "--dry-run", "--json")
    assert not out.exists() and dry["num_bytes"] == whole["num_bytes"]
    run("rewrite", model, "--plan", planned["plan"], "--out", out, "--json")
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (Path(whole["directory"]) / shard.name).read_bytes()
    checked = run("validate", model, out, "--data", texts, "--json")
    assert checked["check"]["token_kl"] > 0
    with pytest.raises(CheckFailedError, match="a factor of"):
        run("validate", model, out, "--data", texts, "--max-perplexity-ratio", 0.01, "--json")


def test_saliency_prints_the_schema(model: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs.json")
    report = run("saliency", model, "--inputs", inputs, "--json")
    assert list(report["layers"]) == ["0", "1"]
    assert report["layers"]["0"]["total_tokens"] == int(read_inputs(inputs)[1].sum())


def test_the_comparison_by_hand(model: Path, texts: Path, tmp_path: Path) -> None:
    out = run("experts", model, "--data", texts, "--ratio", 0.5, "--work", tmp_path, "--no-check", "--json")[
        "directory"
    ]
    inputs = write_inputs(tmp_path / "inputs.json")
    ids, mask = read_inputs(inputs)
    data = read_calibration(inputs, CalibrationConfig())
    found = compare(Checkpoint(model), Checkpoint(Path(out)), data, ValidateConfig())
    log_probs = []
    for directory in (model, out):
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            log_probs.append(reference.eval()(input_ids=ids, attention_mask=mask).logits.log_softmax(-1))
    losses, divergences, agreements = [[], []], [], []
    for row in range(len(ids)):
        for place in range(int(mask[row].sum()) - 1):
            before, after = log_probs[0][row, place], log_probs[1][row, place]
            losses[0].append(-float(before[ids[row, place + 1]]))
            losses[1].append(-float(after[ids[row, place + 1]]))
            divergences.append(float((before.exp() * (before - after)).sum()))
            agreements.append(int(before.argmax()) == int(after.argmax()))
    assert found.num_tokens == len(agreements)
    np.testing.assert_allclose(found.perplexity_before, np.exp(np.mean(losses[0])), rtol=1e-5)
    np.testing.assert_allclose(found.perplexity_after, np.exp(np.mean(losses[1])), rtol=1e-5)
    np.testing.assert_allclose(found.token_kl, np.mean(divergences), rtol=1e-4)
    assert found.top1_agreement == np.mean(agreements)
    same = compare(Checkpoint(model), Checkpoint(model), data, ValidateConfig())
    assert (same.token_kl, same.top1_agreement, same.perplexity_ratio) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("bound", "passes"),
    [
        ({"max_perplexity_ratio": 1.5}, True),
        ({"max_perplexity_ratio": 1.4}, False),
        ({"max_token_kl": 0.2}, True),
        ({"max_token_kl": 0.1}, False),
        ({"min_top1_agreement": 0.75}, True),
        ({"min_top1_agreement": 0.76}, False),
    ],
)
def test_bounds_that_fail(bound: dict[str, float], passes: bool) -> None:
    comparison = Comparison(100, 10.0, 15.0, 0.15, 0.75)
    if passes:
        require_bounds(comparison, ValidateConfig(**bound))
    else:
        with pytest.raises(CheckFailedError) as raised:
            require_bounds(comparison, ValidateConfig(**bound))
        assert exit_code(raised.value) == 1


def test_nan_breaks_every_bound() -> None:
    with pytest.raises(CheckFailedError):
        require_bounds(Comparison(1, 1.0, float("nan"), 0.0, 1.0), ValidateConfig(max_perplexity_ratio=2.0))


def test_calibration_rows_in_every_form(model: Path, tmp_path: Path) -> None:
    tokenize = tokenizer_of(model)
    files = {
        "a.txt": "w1 w2 w3\n\nw4 w5\n",
        "b.json": json.dumps(["w1 w2 w3", {"prompt": "w4 w5"}]),
        "c.jsonl": '{"text": "w1 w2 w3"}\n{"input_ids": [4, 5]}\n',
        "d.json": json.dumps({"prompts": [{"question": "w1 w2 w3"}, "w4 w5"]}),
        "f.json": json.dumps({"first": {"instruction": "w1 w2 w3"}, "second": {"messages": None, "text": "w4 w5"}}),
        "g.json": json.dumps({"easy": {"a": {"prompt": "w1 w2 w3"}}, "hard": {"b": ["w4 w5"]}}),
        "h.json": "\ufeff" + json.dumps({"first": "w1 w2 w3", "second": "w4 w5"}),
        "e.json": json.dumps({"input_ids": [[1, 2, 3], [4, 5, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        data = read_calibration(tmp_path / name, CalibrationConfig(), tokenize)
        assert [sequence.ids for sequence in data.sequences] == [(1, 2, 3), (4, 5)], name
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "w7 w8"}]}]))
    chat = read_calibration(tmp_path / "chat.json", CalibrationConfig(), tokenize)
    assert chat.sequences[0].ids == (VOCAB - 1, 7, 8)


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("x.json", "[", InputError, "is not JSON"),
        ("x.json", "[]", InputError, "no calibration row"),
        ("x.json", '{"a": 1}', InputError, "neither a list"),
        ("x.json", '[{"role": "user"}]', InputError, "row 0 of .* has no text"),
        ("x.jsonl", '"ok"\n{', InputError, "line 2 of"),
        ("x.json", '["some text"]', UsageError, "no tokenizer"),
        ("x.json", '[{"input_ids": [1, "2"]}]', InputError, "not a list of token ids"),
        ("x.json", '[{"input_ids": [1, 2], "attention_mask": [0, 0]}]', InputError, "no token outside"),
        ("x.csv", "a,b", InputError, "is not a calibration file"),
        (None, "", NotFoundError, "does not exist"),
    ],
)
def test_bad_calibration_files(
    name: str | None, text: str, kind: type[SparkrayError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / (name or "absent.json")
    if name is not None:
        path.write_text(text)
    with pytest.raises(kind, match=message):
        read_calibration(path, CalibrationConfig())


def test_text_longer_than_the_context(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input_ids": [3] * 50}) + "\n" + json.dumps({"input_ids": list(range(30))}) + "\n")
    with pytest.raises(InputError, match=r"row 0 .* has 50 tokens, and at most 20"):
        read_calibration(path, CalibrationConfig(max_sequence_tokens=20))
    cut = read_calibration(path, CalibrationConfig(max_sequence_tokens=20, long_text="truncate"))
    assert [len(sequence.ids) for sequence in cut.sequences] == [20, 20]
    split = read_calibration(path, CalibrationConfig(max_sequence_tokens=20, long_text="split"))
    assert [len(sequence.ids) for sequence in split.sequences] == [20, 20, 10, 20, 10]
    assert split.sequences[4].ids == tuple(range(20, 30))
    path.write_text(json.dumps({"input_ids": [3] * (CONTEXT + 1)}))
    with pytest.raises(InputError, match=f"the model's context is {CONTEXT}"):
        check_data(Checkpoint(model), read_calibration(path, CalibrationConfig()))
    path.write_text(json.dumps({"input_ids": [3, VOCAB]}))
    with pytest.raises(InputError, match="outside of the model's"):
        check_data(Checkpoint(model), read_calibration(path, CalibrationConfig()))


def test_texts_are_cut_to_a_context_shorter_than_the_longest_sequence(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([" ".join(["w3"] * (CONTEXT + 9))]))
    lengths = {
        rule: [len(row.ids) for row in load_data(Checkpoint(model), path, CalibrationConfig(long_text=rule)).sequences]
        for rule in ("truncate", "split", "refuse")
    }
    assert lengths == {"truncate": [CONTEXT], "split": [CONTEXT, 9], "refuse": [CONTEXT + 9]}


@pytest.mark.parametrize(("device", "kind"), [("banana", UsageError), ("cuda:77", UnavailableError)])
def test_a_device_that_is_not_there_is_told(
    device: str, kind: type[SparkrayError], model: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=device):
        run("observe", model, "--data", texts, "--device", device, "--work", tmp_path)


def test_an_impossible_ratio_is_refused_before_observing(model: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would stay, and the router picks"):
        run("experts", model, "--data", texts, "--ratio", 0.9, "--work", tmp_path / "w")
    with pytest.raises(UsageError, match="ratio"):
        run("experts", model, "--data", texts, "--ratio", 1.0, "--work", tmp_path / "w")
    assert not (tmp_path / "w").exists()


KILLED_WHILE_OBSERVING = """
import os, signal, sys
from pathlib import Path
from sparkray.config.pruning import CalibrationConfig, ObserveConfig
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import observation_key, observe
from sparkray.pruning.partials import PartialStore
from sparkray.pruning.pipeline import load_data

checkpoint = Checkpoint(Path(sys.argv[1]))
data = load_data(checkpoint, Path(sys.argv[2]), CalibrationConfig())
config = ObserveConfig(shard_sequences=1)
store = PartialStore(Path(sys.argv[3]) / "observations", observation_key(checkpoint, data, config))
observe(checkpoint, data, config, store, lambda done, total: done == 3 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_kill_nine_while_observing_goes_on_with_the_same_sums(model: Path, texts: Path, tmp_path: Path) -> None:
    one_each = ("--set", "observe.shard_sequences=1", "--json")
    whole = run("plan", model, "--data", texts, "--work", tmp_path / "whole", *one_each)
    command = [sys.executable, "-c", KILLED_WHILE_OBSERVING, str(model), str(texts), str(tmp_path / "killed")]
    assert subprocess.run(command, timeout=240, check=False).returncode == -signal.SIGKILL
    left = sorted((tmp_path / "killed").rglob("*"))
    assert [path.name for path in left if path.is_file()] == [f"shard-{number:05d}.npz" for number in range(3)]
    times = {path: path.stat().st_mtime_ns for path in left if path.is_file()}
    done = run("plan", model, "--data", texts, "--work", tmp_path / "killed", *one_each)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    plans = [json.loads(Path(report["plan"]).read_text()) for report in (whole, done)]
    assert plans[0] == plans[1]


KILLED_WHILE_REWRITING = """
import os, signal, sys
from pathlib import Path
from sparkray.pruning import surgery
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.plan import read_plan
from sparkray.pruning.rewrite import rewrite

write, calls = os.write, 0

def killing(handle, data):
    global calls
    calls += 1
    if calls == 6:
        write(handle, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(handle, data)

surgery.os.write = killing
rewrite(Checkpoint(Path(sys.argv[1])), read_plan(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_kill_nine_while_rewriting_never_leaves_half_a_shard(model: Path, texts: Path, tmp_path: Path) -> None:
    planned = run("plan", model, "--data", texts, "--work", tmp_path, "--json")["plan"]
    run("rewrite", model, "--plan", planned, "--out", tmp_path / "whole", "--json")
    command = [sys.executable, "-c", KILLED_WHILE_REWRITING, str(model), planned, str(tmp_path / "out")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    shards = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.safetensors")}
    finished = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert all(path.read_bytes() == shards[path.name] for path in finished)
    assert list((tmp_path / "out.partial").glob(".*.tmp"))
    again = run("rewrite", model, "--plan", planned, "--out", tmp_path / "out", "--json")
    assert again["num_reused"] >= 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == shards
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
