"""Calibration sets by name: files, tasks of reasoning-gym, datasets; joined, with a number of rows each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparkray.config.pruning import CalibrationConfig
from sparkray.errors import NotFoundError, SparkrayError, UnavailableError, UsageError
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.calibration_sources import CalibrationSource, dataset_rows, parse_sources


def tokenize(text: object) -> list[int]:
    return list(str(text).encode())


def test_names_are_taken_apart() -> None:
    assert parse_sources("a/b.json") == [CalibrationSource("a/b.json")]
    assert parse_sources("a.jsonl:5, reasoning-gym[chain_sum+gcd]:64,org/name[sub,set](test):7,org/plain") == [
        CalibrationSource("a.jsonl", num_rows=5),
        CalibrationSource("reasoning-gym", "chain_sum+gcd", num_rows=64),
        CalibrationSource("org/name", "sub,set", "test", 7),
        CalibrationSource("org/plain"),
    ]
    with pytest.raises(UsageError, match=r"'name\[' is no calibration set"):
        parse_sources("name[")


def test_a_path_that_exists_is_a_file_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "odd,name(1).json"
    path.write_text('["ab"]')
    assert read_calibration(str(path), CalibrationConfig(), tokenize).sequences[0].ids == (97, 98)


def test_tasks_share_the_rows_and_answers_come_along() -> None:
    rows = list(dataset_rows(CalibrationSource("reasoning-gym", "chain_sum+gcd", num_rows=5), seed=3))
    assert len(rows) == 5
    question, _, answer = rows[0]["text"].rpartition("\n")
    sums = question.split(":")[-1].strip().rstrip("?=. ") if ":" in question else question
    assert int(answer) == eval(sums.split("=")[0]), question
    assert rows == list(dataset_rows(CalibrationSource("reasoning-gym", "chain_sum+gcd", num_rows=5), seed=3))
    assert rows != list(dataset_rows(CalibrationSource("reasoning-gym", "chain_sum+gcd", num_rows=5), seed=4))


def test_parts_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 3}) + "\n" for letter in "abcdef"))
    data = read_calibration(f"{tmp_path}/a.jsonl:2,reasoning-gym[gcd]:3", CalibrationConfig(), tokenize)
    assert len(data.sequences) == 5
    assert {len(sequence.ids) for sequence in data.sequences[:2]} == {3}


def test_a_folder_is_read_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"instruction": "ask", "output": "reply"}, {"text": "plain"}, {"text": "more"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = list(dataset_rows(CalibrationSource(str(folder), num_rows=2), seed=0))
    assert [row["text"] for row in rows] == ["ask\nreply", "plain"]


@pytest.mark.parametrize(
    ("source", "kind"),
    [("reasoning-gym[no_such_task]:3", NotFoundError), ("./no-such-folder/set", UnavailableError)],
)
def test_what_cannot_be_found_says_so(source: str, kind: type[SparkrayError]) -> None:
    with pytest.raises(kind, match=r"no_such_task|no-such-folder"):
        read_calibration(source, CalibrationConfig(), tokenize)
