"""A batch of prompts against a server that counts what it is asked: kills, torn tails, dead replicas, file shapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_server import Server

from sparkray.config.batch_prompts import BatchPromptsConfig
from sparkray.errors import BusyError, InputError, NotFoundError, SparkrayError, UnavailableError
from sparkray.serving.batch.journal import Journal
from sparkray.serving.batch.prompt_file import prompt_keys, read_prompt_file
from sparkray.serving.batch.run import BatchFailedError, run_batch

JOB = Path(__file__).parents[2] / "jobs" / "batch_prompts.py"
NUM_PROMPTS = 24


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([f"prompt number {number}" for number in range(NUM_PROMPTS)]))
    return path


def settings(prompts: Path, *servers: Server, **changed: Any) -> BatchPromptsConfig:
    values = {
        "input": str(prompts),
        "out": str(prompts.with_name("out.json")),
        "url": ",".join(server.url for server in servers),
        "retry_seconds": 0.01,
    }
    return BatchPromptsConfig.model_validate(values | changed)


def quiet(*_: object) -> None: ...


def job(prompts: Path, server: Server, *more: str) -> subprocess.Popen[str]:
    out = str(prompts.with_name("out.json"))
    command = [sys.executable, str(JOB), "--input", str(prompts), "--out", out, "--url", server.url, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def journalled(prompts: Path) -> list[bytes]:
    path = prompts.with_name("out.json.journal.jsonl")
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def test_kill_nine_after_fourteen_leaves_ten_to_do(server: Server, prompts: Path) -> None:
    server.holds_from = 14
    first = job(prompts, server, "--concurrency", "1")
    deadline = time.monotonic() + 120
    while len(journalled(prompts)) < 14 or server.num_open == 0:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.005)
    first.kill()
    shown, _ = first.communicate(timeout=60)
    assert not prompts.with_name("out.json").exists()
    kept = journalled(prompts)
    assert len(kept) == 14
    assert shown.count("prompt number") <= 14  # a prompt is shown after it is on the disk
    with prompts.with_name("out.json.journal.jsonl").open("ab") as file:
        file.write(b'{"key": "torn by a ki')
    before = Counter(server.asked)
    assert before.total() == 15  # one was on its way
    server.released.set()
    second = job(prompts, server, "--json")
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    summary = json.loads(output)
    assert (summary["num_done_before"], summary["num_done_now"], summary["num_torn_bytes"]) == (14, 10, 21)
    assert sum((server.asked - before).values()) == 10
    assert journalled(prompts)[:14] == kept
    data = json.loads(prompts.with_name("out.json").read_text())
    assert [row["prompt"] for row in data["results"]] == [f"prompt number {n}" for n in range(NUM_PROMPTS)]
    assert [row["response"] for row in data["results"]] == [f"prompt number {n}"[::-1] for n in range(NUM_PROMPTS)]
    assert len({json.loads(line)["key"] for line in journalled(prompts)}) == NUM_PROMPTS
    third = run_batch(settings(prompts, server), quiet)
    assert (third["num_done_before"], third["num_done_now"]) == (24, 0)
    assert sum((server.asked - before).values()) == 10


def test_sigterm_finishes_what_is_in_flight(server: Server, prompts: Path) -> None:
    server.delay_seconds = 0.2
    running = job(prompts, server, "--concurrency", "3")
    deadline = time.monotonic() + 120
    while len(journalled(prompts)) < 3:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert len(journalled(prompts)) == sum(server.asked.values()) < NUM_PROMPTS


def test_counts_come_from_usage_and_tokenizer(server: Server, prompts: Path) -> None:
    summary = run_batch(settings(prompts, server, system="be brief", limit=5), quiet)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (5 * 5, 5 * 3)
    assert (summary["tokenizer_prompt_tokens"], summary["tokenizer_completion_tokens"]) == (25, 15)
    assert summary["num_prompt_count_differs"] == 0
    server.has_tokenize = False
    rows: list[Any] = []
    run_batch(settings(prompts, server, limit=5), lambda _prompt, row, _done, _total: rows.append(row))
    assert [row["tokenizer"] for row in rows] == [None] * 5


def test_prompts_spread_over_servers_and_a_dead_one_costs_nothing(server: Server, prompts: Path) -> None:
    other, dead = Server(), Server()
    dead.http.shutdown()
    dead.http.server_close()
    server.delay_seconds = other.delay_seconds = 0.01
    summary = run_batch(settings(prompts, server, other, dead, max_attempts=50), quiet)
    assert summary["num_answered"] == NUM_PROMPTS
    assert server.asked and other.asked
    assert all(count == 1 for count in (server.asked + other.asked).values())
    other.http.shutdown()


def test_a_server_that_is_busy_is_asked_again(server: Server, prompts: Path) -> None:
    server.status = lambda prompt: 503 if server.asked[prompt] < 3 else 200
    assert run_batch(settings(prompts, server), quiet)["num_answered"] == NUM_PROMPTS
    assert set(server.asked.values()) == {3}


def test_a_refused_prompt_is_told_and_asked_again_next_time(server: Server, prompts: Path) -> None:
    server.status = lambda prompt: 400 if prompt.endswith("7") else 200
    with pytest.raises(BatchFailedError, match="2 of 24 prompts have no answer; the first reason is 400: refused"):
        run_batch(settings(prompts, server), quiet)
    data = json.loads(prompts.with_name("out.json").read_text())
    assert (data["num_answered"], data["num_failed"]) == (22, 2)
    server.status = lambda _prompt: 200
    assert run_batch(settings(prompts, server), quiet)["num_done_now"] == 2


def test_a_server_that_stays_down_ends_the_run(server: Server, prompts: Path) -> None:
    server.status = lambda _prompt: 500
    with pytest.raises(BatchFailedError, match="24 of 24 prompts"):
        run_batch(settings(prompts, server, max_attempts=2), quiet)
    assert set(server.asked.values()) == {2}
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UnavailableError, match="no server answers at"):
        run_batch(settings(prompts, server), quiet)


def test_other_settings_are_other_answers(server: Server, prompts: Path) -> None:
    run_batch(settings(prompts, server, limit=3), quiet)
    assert run_batch(settings(prompts, server, limit=3, max_tokens=7), quiet)["num_done_now"] == 3
    assert run_batch(settings(prompts, server, limit=4), quiet)["num_done_now"] == 1
    with pytest.raises(NotFoundError, match="has no model 'huge'; it has tiny"):
        run_batch(settings(prompts, server, model="huge"), quiet)


def test_two_runs_do_not_write_one_journal(server: Server, prompts: Path) -> None:
    with (
        Journal(prompts.with_name("out.json.journal.jsonl")),
        pytest.raises(BusyError, match="in use by another run"),
    ):
        run_batch(settings(prompts, server), quiet)


@given(cut=st.integers(0, 400), rows=st.lists(st.text(max_size=20), min_size=1, max_size=6))
def test_a_journal_cut_anywhere_keeps_its_whole_rows(
    cut: int, rows: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    lengths = []
    with Journal(path) as journal:
        for number, text in enumerate(rows):
            journal.add(str(number), {"text": text})
            lengths.append(path.stat().st_size)
    cut = min(cut, lengths[-1])
    os.truncate(path, cut)
    whole = sum(length <= cut for length in lengths)
    with Journal(path) as journal:
        assert journal.rows == {str(number): {"text": rows[number]} for number in range(whole)}
        journal.add("new", {"text": "x"})
    with Journal(path) as journal:
        assert len(journal.rows) == whole + 1 and journal.num_torn_bytes == 0


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '["x", "y"]', [("0", None, "x"), ("1", None, "y")]),
        ("a.json", '[{"id": 7, "prompt": "x"}, {"question": "y"}]', [("7", None, "x"), ("1", None, "y")]),
        ("a.json", '{"prompts": [{"name": "n", "text": "x", "category": "c"}]}', [("n", "c", "x")]),
        ("a.json", '{"math": ["x"], "code": ["y"]}', [("0", "math", "x"), ("1", "code", "y")]),
        ("a.json", '{"first": "x", "second": "y"}', [("first", None, "x"), ("second", None, "y")]),
        ("a.json", '{"one": {"prompt": "x"}, "two": {"prompts": ["y"]}}', [("0", "one", "x"), ("1", "two", "y")]),
        ("a.json", '[{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]}]', None),
        ("a.jsonl", '"x"\n\n{"prompt": "y"}\n', [("0", None, "x"), ("1", None, "y")]),
        ("a.txt", "x\n\n y \n", [("0", None, "x"), ("1", None, "y")]),
    ],
)
def test_prompt_files_of_many_shapes(
    name: str, text: str, expected: list[tuple[str, str | None, str]] | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    found = read_prompt_file(tmp_path / name)
    if expected is None:
        assert [message["role"] for message in found[0].messages] == ["system", "user"]
    else:
        assert [(prompt.id, prompt.category, prompt.text) for prompt in found] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[", "is not JSON"),
        ("a.json", "[]", "holds no prompt"),
        ("a.json", "3", "holds a int"),
        ("a.json", '["ok", {"answer": 1}]', "row 1 of"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', "row 0 of"),
        ("a.jsonl", '"ok"\n{', "line 2 of"),
        ("a.csv", "x", "is no prompt file"),
        (None, "", "does not exist"),
    ],
)
def test_bad_prompt_files(name: str | None, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "absent.json")
    if name is not None:
        path.write_text(text)
    kind: type[SparkrayError] = InputError if name is not None else NotFoundError
    with pytest.raises(kind, match=message):
        read_prompt_file(path)


def test_equal_prompts_have_keys_of_their_own_whatever_stands_between(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    paths[0].write_text('["x", "x", "y"]')
    paths[1].write_text('["y", "x", "new", "x"]')
    first, second = (
        prompt_keys(read_prompt_file(path), model="m", system=None, sampling={"temperature": 0}) for path in paths
    )
    assert len(set(first)) == 3
    assert (second[0], second[1], second[3]) == (first[2], first[0], first[1])
