"""Datasets: what is refused, and an order that a step number alone decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.base import validate_settings
from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InputError, NotFoundError, UsageError
from sparkray.grpo.data import encode_rows, num_steps, read_rows, rows_of_step


def write(folder: Path, text: str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_the_three_formats(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n")
    whole = write(tmp_path, json.dumps(rows), "rows.json")
    assert read_rows(lines) == read_rows(whole) == read_rows(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "rows.jsonl", "is empty"),
        ('{"prompt": "a"}\n{"answer": "1"}', "rows.jsonl", "row 1 .* needs a `prompt`.*columns are answer"),
        ('{"prompt": "  "}', "rows.jsonl", "row 0"),
        ('{"prompt": [{"role": "user"}]}', "rows.jsonl", "role and content"),
        ("{oops", "rows.jsonl", "line 1 .* not JSON"),
        ("[1]", "rows.json", "list of objects"),
        ("prompt\na", "rows.csv", "Accepted"),
    ],
)
def test_refuses(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_rows(write(tmp_path, text, name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        read_rows(tmp_path / "nowhere.jsonl")


@given(num_rows=st.integers(1, 40), prompts=st.integers(1, 16), seed=st.integers(0, 9), start=st.integers(0, 20))
def test_the_order_needs_no_past(num_rows: int, prompts: int, seed: int, start: int) -> None:
    def of(step: int) -> list[int]:
        return rows_of_step(step, num_rows=num_rows, prompts_per_step=prompts, seed=seed)

    assert of(start) == of(start)
    # Every pass over the dataset has each row once.
    flat = [row for step in range(num_rows) for row in of(step)]
    for first in range(0, num_rows * prompts, num_rows):
        assert Counter(flat[first : first + num_rows]) == Counter(range(num_rows))


def test_passes_and_seeds_differ() -> None:
    def flat(seed: int) -> list[int]:
        return [row for step in range(8) for row in rows_of_step(step, num_rows=16, prompts_per_step=4, seed=seed)]

    assert flat(0)[:16] != flat(0)[16:]
    assert flat(0) != flat(1)


def test_num_steps() -> None:
    config = GrpoConfig(dataset="d", output_dir="o", prompts_per_step=8, epochs=1.5)
    assert num_steps(config, 20) == 4  # 30 prompts
    assert num_steps(config.model_copy(update={"max_steps": 7}), 20) == 7


def test_a_prompt_that_is_too_long_is_not_cut() -> None:
    class Words:
        def __call__(self, text: str) -> Any:
            return type("Encoded", (), {"input_ids": text.split()})

    config = GrpoConfig(dataset="d", output_dir="o", max_prompt_tokens=3)
    assert encode_rows(Words(), [{"prompt": "a b c"}], config) == [("a", "b", "c")]
    with pytest.raises(InputError, match="row 1 has 4 tokens, and 1 to 3"):
        encode_rows(Words(), [{"prompt": "a"}, {"prompt": "a b c d"}], config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 1}, "num_generations.*greater than or equal to 2"),
        ({"num_ranks": 3}, "multiple of num_ranks"),
        ({"method": "full", "sync": {"transport": "lora"}}, "no adapter"),
        ({"method": "qlora"}, "4-bit"),
        ({"reward": {"terms": []}}, "no reward"),
        ({"reward": {"terms": [{"kind": "python", "target": "x"}]}}, "module:function"),
        ({"max_prompt_tokens": 2000}, "max_model_len"),
        ({"steps_off": 1, "max_staleness": 0}, "max_staleness 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_settings(GrpoConfig, {"dataset": "d", "output_dir": "o", **values})
