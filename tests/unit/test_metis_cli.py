"""`sparkray metis`: fitting a profile on a recording, and listing what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sparkray.cli.metis import app
from sparkray.errors import InputError, NotFoundError, SparkrayError, UsageError
from sparkray.metis.calibration import cross_check, fit_profile
from sparkray.metis.profile import ProfileStore
from sparkray.metis.recordings import read_recording


def streams(num: int = 40, seed: int = 0) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.gamma(1.0, 1.0, 100).tolist() for _ in range(num)]


def folder_of(path: Path, rows: list[list[float] | None], **settings: Any) -> Path:
    path.mkdir()
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pa.table(
            {"id": [str(at) for at in range(len(part))], "entropies": pa.array(part, pa.list_(pa.float32()))}
        )
        pq.write_table(table, path / f"part-{number:05d}.parquet")
    (path / "_run.json").write_text(json.dumps(settings))
    return path


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_fit_a_folder_and_list_it(tmp_path: Path) -> None:
    recording = folder_of(tmp_path / "run", [*streams(), None], model="embedded", temperature=0.7, boost="off")
    result = invoke("fit", recording, "--into", tmp_path / "profiles", "--seed", 3, "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["name"] == "smollm2-135m-instruct/t0.7/chat"
    stored = ProfileStore([tmp_path / "profiles"]).load(told["name"])
    wanted = fit_profile(
        [np.float32(stream).astype(float) for stream in streams()],
        model="SmolLM2-135M-Instruct",
        temperature=0.7,
        seed=3,
    )
    assert stored == wanted
    assert [row["arl_tokens"] for row in told["held_out"]] == [200.0, 1000.0, 5000.0]
    assert told["held_out"][0]["num_tokens"] == 1000
    assert told["held_out"][0]["num_expected"] == 5.0
    listed = json.loads(invoke("profiles", "--profile-dir", tmp_path / "profiles", "--json").stdout)["profiles"]
    assert told["name"] in [profile["name"] for profile in listed]
    assert "mean 1.0" in invoke("profiles", "--profile-dir", tmp_path / "profiles").stdout


def test_fit_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps({"entropies": stream}) for stream in streams()) + "\n\n")
    result = invoke(
        "fit", file, "--into", tmp_path, "--model", "a/B", "--temperature", 1, "--task", "maths", "--hold-out", 0
    )
    assert result.exit_code == 0
    assert "b/t1/maths: 4000 tokens of 40 answers" in result.stdout
    assert "held out" not in result.stdout


def test_a_lost_token_cuts_a_stream(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"entropies": [1, 2, NaN, 3, NaN, NaN, 4, 5]}\n{"entropies": []}\n{"entropies": [NaN]}\n')
    assert [stream.tolist() for stream in read_recording(file).streams] == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"entropies": "x"}', InputError),
        ('{"entropies": [[1]]}', InputError),
        ('{"entropies": ["a"]}', InputError),
        ('{"other": 1}', UsageError),
        ("not json", UsageError),
        ("3", UsageError),
    ],
)
def test_lines_that_are_no_answers(text: str, error: type[SparkrayError], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"entropies": [1.0]}\n' + text)
    with pytest.raises(error, match="2"):
        read_recording(file)


def test_what_cannot_be_fitted_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_recording(tmp_path / "nothing")
    with pytest.raises(UsageError, match="part-"):
        read_recording(tmp_path)
    boosted = folder_of(tmp_path / "boosted", list(streams()), model="embedded", temperature=0.7, boost="published")
    with pytest.raises(UsageError, match="published"):
        read_recording(boosted)
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"entropies": streams(1)[0]}))
    with pytest.raises(UsageError) as caught:
        invoke("fit", file, "--into", tmp_path)
    assert caught.value.param == "model"
    with pytest.raises(InputError, match="at least 500"):
        invoke("fit", file, "--into", tmp_path, "--model", "m", "--temperature", 1)
    with pytest.raises(InputError, match="temperature"):
        fit_profile(streams(), model="m", temperature=-1)


def test_cross_check_counts_on_answers_that_were_not_fitted() -> None:
    """200 of 400 answers, 20,000 tokens: 100 false alarms expected at one in 200; within 4 sigma and the fit."""
    checked = cross_check(streams(400), share=0.5, temperature=1.0, arls_tokens=(200.0,))[200.0]
    assert checked.num_tokens == 20_000
    assert 50 < checked.num_hedge < 150
    assert 50 < checked.num_refuse < 150
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="one side empty"):
            cross_check(streams(4), share=share, temperature=1.0)
