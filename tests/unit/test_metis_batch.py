"""Reading prompts and writing parts: what is refused, what survives a kill, and that every prompt is there once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.config import load_settings
from sparkray.config.batch import WatchPromptsConfig
from sparkray.errors import BusyError, InputError, NotFoundError, UnavailableError, UsageError
from sparkray.metis.batch_input import PromptRow, read_prompts
from sparkray.metis.batch_output import PartWriter, answered_row, refused_row
from sparkray.metis.batch_run import BatchRun


def _write(path: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def test_ids_are_given_or_made_of_the_content(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "in.jsonl",
        b"\xef\xbb\xbf" + b'{"prompt": "one", "id": "a", "answer": 3}\r',
        {"id": 7, "messages": [{"role": "user", "content": "hi"}]},
        "",
        {"prompt": "two"},
        {"prompt": "two"},
        {"prompt": "zw\u00f6lf"},
    )
    rows = read_prompts(path)
    name = hashlib.sha256(b'{"prompt": "two"}').hexdigest()[:16]
    assert [row.id for row in rows[:4]] == ["a", "7", name, f"{name}-2"]
    assert [row.prompt for row in rows] == ["one", None, "two", "two", "zw\u00f6lf"]
    assert json.loads(rows[1].messages_json or "") == [{"role": "user", "content": "hi"}]
    assert rows[4].digest == hashlib.sha256('{"prompt": "zw\u00f6lf"}'.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "line 2: not JSON"),
        ("3", "line 2: a int"),
        ("{}", "line 2: either"),
        ('{"prompt": "x", "messages": []}', "line 2: either"),
        ('{"prompt": ""}', "line 2: prompt is empty"),
        ('{"prompt": " \\n"}', "line 2: prompt is empty"),
        ('{"prompt": 5}', "line 2: prompt is 5"),
        ('{"prompt": "\\ud800"}', "line 2: prompt holds"),
        ('{"messages": []}', "line 2: messages"),
        ('{"messages": [{"role": "user"}]}', "line 2: message"),
        ('{"messages": [{"role": "user", "content": " "}]}', "line 2: all messages"),
        ('{"prompt": "x", "id": ""}', "line 2: id"),
        ('{"prompt": "x", "id": true}', "line 2: id"),
        ('{"prompt": "x", "id": 1.5}', "line 2: id"),
        ('{"prompt": "x", "id": "a"}', "line 2: id 'a' is that of line 1"),
        (b'{"prompt": "\xff"}', "line 2: byte"),
        ('{"prompt": ' + "[" * 100_000, "line 2: nested"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, said: str) -> None:
    path = _write(tmp_path / "in.jsonl", {"prompt": "fine", "id": "a"}, line, {"prompt": "fine too"})
    with pytest.raises(InputError, match=said):
        read_prompts(path)


def test_many_bad_lines_are_counted_and_no_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 5: .*; and 3 more"):
        read_prompts(_write(tmp_path / "bad.jsonl", *["{"] * 8))
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(_write(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(NotFoundError):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path)


PROMPTS = [PromptRow(f"p{n}", json.dumps({"prompt": f"text {n}"}), f"digest{n}") for n in range(10)]
TOKENS_TF = np.array(
    [
        # entropy confidence max_prob z hedge refuse action boosted
        [1.0, 0.9, 0.5, 0.1, 0.2, 0.3, 0.0, 0.0],
        [4.0, 0.7, 0.1, 2.0, 5.0, 5.0, 1.0, 0.0],
        [2.5, 0.8, 0.2, 1.0, 0.0, 6.0, 0.0, 1.0],
        [np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan],
    ],
    dtype=np.float32,
)


def _answer(prompt: PromptRow) -> dict[str, Any]:
    return answered_row(
        prompt, text="yes", token_ids=[5, 6, 7, 8], finish_reason="stop", num_prompt_tokens=3, tokens_TF=TOKENS_TF
    )


def test_a_row_comes_back_from_parquet_as_it_was(tmp_path: Path) -> None:
    with closing(PartWriter(tmp_path / "out", {})) as writer:
        writer.add(_answer(PROMPTS[0]))
        writer.add(refused_row(PROMPTS[1], "too long"))
        writer.add(
            answered_row(
                PROMPTS[2],
                text="",
                token_ids=[],
                finish_reason="abort",
                num_prompt_tokens=3,
                tokens_TF=TOKENS_TF[:0],
            )
        )
    row, refused, empty = pq.read_table(tmp_path / "out").to_pylist()
    assert (row["id"], row["prompt"], row["messages"], row["error"]) == ("p0", "text 0", None, None)
    assert (row["token_ids"], row["num_tokens"], row["finish_reason"]) == ([5, 6, 7, 8], 4, "stop")
    assert row["entropies"][:3] == [1.0, 4.0, 2.5]
    assert np.isnan(row["entropies"][3]), "a token that was never recorded has no entropy"
    assert row["actions"] == [0, 1, 0, 0]
    assert row["boosted"] == [False, False, True, False]
    assert (row["mean_entropy"], row["num_hedge"], row["num_refuse"]) == (2.5, 1, 0)
    assert (refused["id"], refused["error"], refused["text"], refused["entropies"]) == ("p1", "too long", None, None)
    assert (empty["entropies"], empty["mean_entropy"], empty["num_tokens"]) == ([], None, 0)


def test_parts_are_cut_by_rows_and_by_age(tmp_path: Path) -> None:
    with closing(PartWriter(tmp_path / "rows", {}, rows_per_part=3)) as writer:
        for prompt in PROMPTS[:7]:
            writer.add(_answer(prompt))
        assert sorted(path.name for path in (tmp_path / "rows").glob("part*")) == [
            "part-000000.parquet",
            "part-000001.parquet",
        ]
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "rows").glob("part*"))] == [3, 3, 1]
    with closing(PartWriter(tmp_path / "age", {}, part_seconds=1e-9)) as writer:
        writer.add(_answer(PROMPTS[0]))
        assert len(list((tmp_path / "age").glob("part*"))) == 1


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 4)), min_size=1, max_size=6))
def test_runs_that_are_cut_anywhere_do_every_prompt_once(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("out")
    for num_before_the_cut, rows_per_part in runs:
        writer = PartWriter(folder, {}, rows_per_part=rows_per_part)
        for prompt in writer.missing(PROMPTS)[:num_before_the_cut]:
            writer.add(_answer(prompt))
        # A kill: rows that wait are lost, and the lock goes with the process.
        writer._lock.release()
    with closing(PartWriter(folder, {})) as writer:
        for prompt in writer.missing(PROMPTS):
            writer.add(_answer(prompt))
        writer.flush()
        assert writer.missing(PROMPTS) == []
    ids = pq.read_table(folder)["id"].to_pylist()
    assert sorted(ids) == sorted(prompt.id for prompt in PROMPTS)


def test_what_waits_is_written_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), closing(PartWriter(tmp_path, {})) as writer:
        writer.add(_answer(PROMPTS[0]))
        raise KeyboardInterrupt
    with closing(PartWriter(tmp_path, {})) as writer:
        assert [prompt.id for prompt in writer.missing(PROMPTS[:2])] == ["p1"]


def test_a_half_written_part_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".part-000000.parquet.tmp").write_bytes(b"half")
    with closing(PartWriter(tmp_path, {})) as writer:
        assert writer.missing(PROMPTS) == PROMPTS
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "part-000000.parquet").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"part-000000\.parquet"):
        PartWriter(tmp_path, {})


def test_a_folder_holds_rows_of_one_kind(tmp_path: Path) -> None:
    first = WatchPromptsConfig(input="a", output="b", temperature=0.5)
    with closing(PartWriter(tmp_path, first.fixed_by_output())):
        pass
    with closing(PartWriter(tmp_path, first.model_copy(update={"concurrency": 4}).fixed_by_output())):
        pass
    other = first.model_copy(update={"temperature": 0.9})
    with pytest.raises(UsageError, match=r"temperature was 0\.5 and is 0\.9"):
        PartWriter(tmp_path, other.fixed_by_output())


def test_a_changed_prompt_under_an_old_id_is_refused(tmp_path: Path) -> None:
    with closing(PartWriter(tmp_path, {})) as writer:
        writer.add(_answer(PROMPTS[0]))
    with closing(PartWriter(tmp_path, {})) as writer, pytest.raises(InputError, match="another prompt"):
        writer.missing([PromptRow("p0", "{}", "other")])


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparkray.metis.batch_output import PartWriter\n"
        "try: PartWriter(Path(sys.argv[1]), {})\n"
        "except Exception as failure: print(type(failure).__name__)"
    )
    with closing(PartWriter(tmp_path, {})):
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=True)
    assert done.stdout.strip() == BusyError.__name__


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnavailableError, match="cannot be written to"):
        PartWriter(tmp_path / "file" / "out", {})


def test_parts_of_all_kinds_of_rows_have_one_schema(tmp_path: Path) -> None:
    with closing(PartWriter(tmp_path, {}, rows_per_part=1)) as writer:
        writer.add(refused_row(PROMPTS[0], "too long"))
        writer.add(_answer(PROMPTS[1]))
    schemas = [pq.read_schema(path) for path in sorted(tmp_path.glob("part*"))]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].field("entropies").type == pa.list_(pa.float32())


def _run_config(tmp_path: Path, **values: Any) -> WatchPromptsConfig:
    _write(tmp_path / "in.jsonl", *({"id": prompt.id, "prompt": f"text {prompt.id}"} for prompt in PROMPTS[:3]))
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    given = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "out"), "model": str(tmp_path / "model")}
    return WatchPromptsConfig(**{**given, **values})


def test_a_run_adds_its_rows_up(tmp_path: Path) -> None:
    config = _run_config(tmp_path)
    with BatchRun(config) as run:
        assert [prompt.id for prompt in run.missing] == ["p0", "p1", "p2"]
        run.add(_answer(run.missing[0]))
        run.add(refused_row(run.missing[1], "too long"))
    with BatchRun(config) as again:
        assert [prompt.id for prompt in again.missing] == ["p2"]
        assert (again.num_done, again.num_prompts) == (2, 3)
        again.add(_answer(again.missing[0]))
    first, second = run.summary(), again.summary()
    assert (first["num_skipped"], first["num_written"], first["num_errors"]) == (0, 2, 1)
    assert (second["num_skipped"], second["num_written"], second["num_errors"]) == (2, 1, 0)
    assert (second["num_tokens"], second["num_hedge"], second["mean_entropy_bits"]) == (4, 1, 2.5)
    assert json.loads(json.dumps(second, allow_nan=False)) == second
    assert BatchRun(config).missing == []


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"model": "no-such-model"}, NotFoundError, "no-such-model"),
        ({"detector": "calibrated"}, NotFoundError, "profile"),
        ({"detector": "calibrated", "profile": "none/such/one"}, InputError, "none/such/one"),
        ({"profile": "some/profile/t07"}, InputError, "metis_profile"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_no_lock(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        BatchRun(_run_config(tmp_path, **values))
    with BatchRun(_run_config(tmp_path)) as run:
        assert len(run.missing) == 3


def test_an_output_that_ray_would_delete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    scratch.mkdir(parents=True)
    config = _run_config(tmp_path, output="out")
    monkeypatch.chdir(scratch)
    with pytest.raises(UsageError, match="absolute path"):
        BatchRun(config)
    monkeypatch.chdir(tmp_path)
    with BatchRun(config) as run:
        assert run.summary()["output"] == str(tmp_path / "out")


JOB = Path(__file__).parents[2] / "jobs" / "watch_prompts.py"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--input", "{in}"], 2, "output"),
        (["--input", "{in}", "--output", "{out}", "--temperature", "nan"], 2, "temperature"),
        (["--input", "{in}", "--output", "{out}", "--detector", "other"], 2, "detector"),
        (["--input", "{in}", "--output", "{out}", "--set", "engine.max_num_seq=3"], 2, "engine.max_num_seq"),
        (["--input", "{bad}", "--output", "{out}"], 4, "line 1"),
        (["--input", "/nowhere/in.jsonl", "--output", "{out}"], 4, "does not exist"),
        (["--input", "{in}", "--output", "{in}/out"], 3, "cannot be written to"),
        (["--input", "{in}", "--output", "{out}", "--model", "/nowhere"], 4, "/nowhere"),
        (["--inputs", "{in}x"], 2, "error"),
    ],
)
def test_the_job_refuses_bad_input_at_once(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    _write(tmp_path / "in", {"prompt": "x"})
    _write(tmp_path / "bad", "{")
    places = {"in": tmp_path / "in", "bad": tmp_path / "bad", "out": tmp_path / "out"}
    command = [sys.executable, str(JOB), *(argument.format(**places) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_finished_run_needs_no_cluster(tmp_path: Path) -> None:
    config = _run_config(tmp_path)
    with BatchRun(config) as run:
        for prompt in run.missing:
            run.add(_answer(prompt))
    flags = ["--input", config.input, "--output", config.output, "--model", config.model]
    done = subprocess.run([sys.executable, str(JOB), *flags], capture_output=True, text=True, timeout=120, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["num_prompts"], summary["num_skipped"], summary["num_written"]) == (3, 3, 0)
    assert "3/3 prompts" in done.stderr


def test_the_shipped_settings_are_accepted() -> None:
    files = sorted((JOB.parents[1] / "configs" / "metis").glob("*.yaml"))
    assert files
    for file in files:
        config = load_settings(WatchPromptsConfig, [file], values={"input": "in", "output": "/out"})
        assert config.engine.max_num_seqs >= config.batch_size
