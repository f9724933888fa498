"""`sparkray search`: a question needs no verb; calibrating and evaluating on a recording made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from search_paths import INFO, toy_questions
from typer.testing import CliRunner

from sparkray.cli.search import app
from sparkray.cli.search_lanes import SearchLanes
from sparkray.errors import InputError, NotFoundError, SparkrayError, UnavailableError
from sparkray.search.recording import write_recording


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recorded") / "paths.parquet"
    write_recording(file, INFO, toy_questions(60, 1, num_paths=8) + toy_questions(25, 2, split="held_out", num_paths=8))
    return file


def test_calibrate_and_evaluate(recording: Path, tmp_path: Path) -> None:
    profile, plot = tmp_path / "profile.json", tmp_path / "plot.png"
    told = json.loads(invoke("calibrate", recording, "--out", profile, "--json").stdout)
    assert told["num_questions"] == 60
    assert profile.is_file()
    arguments = ("eval", recording, "--profile", profile, "--orders", 1)
    found = json.loads(invoke(*arguments, "--plot", plot, "--json").stdout)
    policies = {"full", "adaptive_consistency", "esc", "deepconf_offline", "deepconf_online", "metis", "ours"}
    assert policies <= set(found)
    for name in policies:
        assert {"accuracy", "interval", "tokens", "tokens_saved", "accuracy_delta"} <= set(found[name])
    assert found["num_questions"] == 25
    assert {"false_prune_at_0_05", "false_prune_at_0_1"} <= set(found["ours"])
    assert set(found["realised_false_prune"]) == {"0.05", "0.1"}
    assert found["full"]["tokens_saved"] == 0
    assert found["ours"]["tokens"] < found["full"]["tokens"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = invoke(*arguments).stdout
    assert "25 questions, 16 paths each: toy" in table
    assert "right paths pruned at alpha 0.05" in table


def test_an_evaluation_wants_the_profile_of_its_model(recording: Path) -> None:
    with pytest.raises(NotFoundError, match="no search profile is packaged for the model 'toy'"):
        invoke("eval", recording)


@pytest.mark.parametrize("arguments", [("",), ("ask", "   "), ("", "--json")])
def test_an_empty_question_is_refused_before_an_engine_starts(arguments: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        invoke(*arguments)


def test_whatever_is_no_verb_is_a_question() -> None:
    with pytest.raises(UnavailableError, match=r"no server answers at http://127\.0\.0\.1:9"):
        invoke("What is 3 * 6?", "--url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "setting", ["alpha=0", "alpha=1.5", "num_paths=0", "temperature_spread=1.5", "policy=certified"]
)
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(SparkrayError, match=setting.split("=")[0]):
        invoke("why?", "--url", "http://127.0.0.1:9", "--set", setting)


def test_lanes_show_paths_votes_and_the_outcome() -> None:
    console = Console(record=True, width=110, force_terminal=False)
    path = {"finish_reason": "stop", "index": 0}
    report = {
        "paths": [path, {**path, "index": 1, "finish_reason": "pruned"}],
        "answer": "18",
        "share": 0.75,
        "num_paths": 2,
        "max_paths": 4,
        "num_pruned": 1,
        "num_aborted": 0,
        "num_tokens": 5,
        "seconds": 0.5,
        "closed_by": "lock_in",
        "policy": "certified",
        "note": None,
    }
    with SearchLanes(console) as lanes:
        for event in (
            {"kind": "wave", "wave": 0, "paths": [0, 1]},
            {"kind": "tokens", "path": 0, "entropies": [0.1, None, 4.0]},
            {"kind": "tokens", "path": 1, "entropies": [2.0, 2.0]},
            {"kind": "prune", "path": 1, "num_tokens": 2},
            {"kind": "vote", "path": 0, "answer": "18", "forced": False, "votes": [["18", 0.9], ["17", 0.3]]},
            {"kind": "done", "report": report},
        ):
            lanes.take(event)
        lanes.finish(report)
    text = console.export_text()
    assert "  0 ▪▪▪" in text
    assert "pruned" in text
    assert "18 (75% of the votes)" in text
    assert "2 of 4 paths, 1 pruned, 0 aborted, 5 tokens, 0.5 s, closed by lock_in (certified)" in text
