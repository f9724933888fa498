"""A served model as a user has it: brought up by the command, asked over HTTP, watched, taken down.

One server with the embedded model stands for all tests of this file.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from sparkray.cluster.processes import free_port, marked
from sparkray.cluster.session import Session, find_session

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(900)]

SPARKRAY = str(Path(sys.executable).with_name("sparkray"))
NAME = "test-serve"
SMALL = ["--set", "engine.max_model_len=512", "--set", "engine.max_num_seqs=8", "--set", "engine.kv_cache_gib=0.25"]


def sparkray(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SPARKRAY, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("SPARKRAY_STATE")
    os.environ["SPARKRAY_STATE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["SPARKRAY_STATE"]
    else:
        os.environ["SPARKRAY_STATE"] = before


@pytest.fixture(scope="module")
def session(state: Path) -> Iterator[Session]:
    port = free_port()
    up = sparkray("serve", "up", "--port", str(port), "--name", NAME, "--json", *SMALL, timeout=850)
    assert up.returncode == 0, up.stderr
    assert json.loads(up.stdout)["url"] == f"http://127.0.0.1:{port}"
    session = find_session(NAME)
    yield session
    down = sparkray("serve", "down", "--name", NAME)
    assert down.returncode == 0, down.stderr
    assert marked(session.mark) == []
    assert not Path(session.temp_dir).exists()


@pytest.fixture(scope="module")
def http(session: Session) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=str(session.serve_url), timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(http: httpx.Client) -> str:
    return str(http.get("/v1/models").json()["data"][0]["id"])


def chat(http: httpx.Client, served: str, /, **fields: Any) -> httpx.Response:
    body = {"model": served, "messages": [{"role": "user", "content": "What is the capital of France?"}], **fields}
    return http.post("/v1/chat/completions", json=body)


def num_running(http: httpx.Client) -> int:
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    assert found, "the metric is gone"
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in found)


def test_a_reply_and_its_trace_agree(http: httpx.Client, model: str) -> None:
    reply = chat(http, model, max_tokens=24, temperature=0).json()
    assert "Paris" in reply["choices"][0]["message"]["content"]
    trace = http.get(f"/v1/metis/traces/{reply['id']}").json()
    assert trace["total_tokens"] == reply["usage"]["completion_tokens"] == len(trace["events"])
    assert trace["num_prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert (trace["finished"], trace["finish_reason"], trace["detector"]) == (True, "stop", "metis")
    text = "".join(event["text"] for event in trace["events"]).removesuffix("<|im_end|>")
    assert text == reply["choices"][0]["message"]["content"]


def test_entropy_equals_that_of_the_returned_distribution(http: httpx.Client, model: str) -> None:
    """With the top 20 of a sharp distribution returned, the entropy is bounded from both sides by what they leave."""
    import math

    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 5}
    reply = http.post("/v1/completions", json=body).json()
    event = http.get(f"/v1/metis/traces/{reply['id']}").json()["events"][0]
    top = [math.exp(value) for value in reply["choices"][0]["logprobs"]["top_logprobs"][0].values()]
    assert event["confidence"] == pytest.approx(max(top), abs=2e-3)
    known, rest = -sum(p * math.log2(p) for p in top), max(1e-12, 1 - sum(top))
    # The rest spread over the whole vocabulary is the most that it can add, one token holding it all the least.
    assert known - rest * math.log2(rest) - 0.02 <= event["token_entropy"]
    assert event["token_entropy"] <= known + rest * math.log2(49_152 / rest) + 0.02


def test_the_stream_of_a_trace_follows_the_reply(http: httpx.Client, model: str, session: Session) -> None:
    from sparkray.serving.client import ChatClient
    from sparkray.serving.repl import exchange

    shown: list[int] = []
    with ChatClient(str(session.serve_url)) as client:
        # Long enough that no machine writes it between two looks at the trace.
        messages = [{"role": "user", "content": "Tell a long story about a river, from its spring to the sea."}]
        options = {"max_tokens": 200, "temperature": 0}
        reply = exchange(client, messages, model=model, options=options, show=lambda rows: shown.append(len(rows)))
    assert shown == sorted(shown)
    assert len(shown) > 1, "all tokens came in one update: nothing was live"
    assert [row["step"] for row in reply.rows] == list(range(len(reply.rows)))
    assert "".join(row["text"] for row in reply.rows).removesuffix("<|im_end|>").strip() == reply.text.strip()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_calibrated_detector_needs_nothing_but_its_name(http: httpx.Client, model: str, temperature: float) -> None:
    """Its z is what the packaged profile says of the reported entropies."""
    from sparkray.metis.profile import ProfileStore

    switches = {"metis": 1, "metis_detector": "calibrated"}
    reply = chat(http, model, max_tokens=24, temperature=temperature, vllm_xargs=switches)
    assert reply.status_code == 200, reply.text
    trace = http.get(f"/v1/metis/traces/{reply.json()['id']}").json()
    assert (trace["detector"], trace["note"]) == ("calibrated", None)
    profile = ProfileStore().load(f"smollm2-135m-instruct/t{temperature:g}/chat")
    entropies = np.array([event["token_entropy"] for event in trace["events"]])
    assert [event["z_score"] for event in trace["events"]] == pytest.approx(profile.z_scores(entropies), abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "status", "fragment"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"vllm_xargs": {"metis_detector": "clever"}}, 400, "'metis' or 'calibrated' is expected"),
        ({"vllm_xargs": {"metis_boost": "wild"}}, 400, "metis_boost"),
        ({"vllm_xargs": {"metis_hedge": 0}}, 400, "metis_hedge"),
        ({"vllm_xargs": {"metis": {"nested": 1}}}, 400, "vllm_xargs.metis"),
        ({"vllm_xargs": {"metis_slot": 3}}, 400, "metis_slot"),
        ({"vllm_xargs": {"metis": 1}, "n": 2}, 400, "n must be 1"),
        ({"max_tokens": 5000}, 400, "max_tokens=5000"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "maximum context length is 512"),
        ({"messages": "text"}, 400, "messages: 'text' was given"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stream": True, "vllm_xargs": {"metis_detector": "clever"}}, 400, "metis_detector"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_refused_with_the_reason(
    http: httpx.Client, model: str, fields: dict[str, Any], status: int, fragment: str
) -> None:
    reply = chat(http, model, **fields)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert fragment in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_threshold_that_is_no_number_is_refused(http: httpx.Client, model: str) -> None:
    fields = {
        "model": model,
        "messages": [{"role": "user", "content": "x"}],
        "vllm_xargs": {"metis_hedge": float("nan")},
    }
    reply = http.post("/v1/chat/completions", content=json.dumps(fields), headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "metis_hedge is nan" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "fragment"),
    [(b"{nope", "not JSON"), (b"[1]", "JSON list"), (b'{"a":' + b"[" * 5000, "nests 5001 levels")],
)
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes, fragment: str) -> None:
    reply = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert fragment in reply.json()["error"]["message"]


def test_unknown_paths_and_traces_answer_in_openai_form(http: httpx.Client) -> None:
    for path in ("/nowhere", "/v1/metis/traces/nobody", "/v1/models/nobody"):
        reply = http.get(path)
        assert reply.status_code == 404
        assert "message" in reply.json()["error"]


def test_operations_pages(http: httpx.Client, model: str) -> None:
    assert http.get("/health").json()["models"] == [model]
    assert "/v1/metis/traces/{request_id}" in http.get("/openapi.json").json()["paths"]
    assert "/docs/static/swagger-ui-bundle.js" in http.get("/docs").text
    assert http.get("/docs/static/swagger-ui-bundle.js").status_code == 200


def test_nothing_listens_beyond_the_loopback(session: Session) -> None:
    own = {process.pid for process in marked(session.mark)}
    listening = (found for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN)
    sockets = [found for found in listening if found.pid in own]
    assert len(sockets) > 5
    assert {found.laddr.ip for found in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_clients_that_go_away_leave_nothing_running(http: httpx.Client, model: str, session: Session) -> None:
    """Streams cut by closing the socket, and one whose client leaves before a whole answer."""
    fields = {"max_tokens": 400, "ignore_eos": True, "temperature": 1.0}
    ids = []
    for _ in range(3):
        body = {"model": model, "messages": [{"role": "user", "content": "Tell a story."}], "stream": True, **fields}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: "))
            ids.append(json.loads(next(lines)[6:])["id"])
            for _ in range(5):
                next(lines)
    host, port = str(session.serve_url).removeprefix("http://").split(":")
    whole = json.dumps({"model": model, "messages": [{"role": "user", "content": "Tell a story."}], **fields}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(whole)}", "", ""]).encode() + whole)
        wait_for(lambda: num_running(http) > 0, "the request runs")
    wait_for(lambda: num_running(http) == 0, "the engine is idle again", seconds=30)
    for request_id in ids:
        trace = http.get(f"/v1/metis/traces/{request_id}").json()
        assert trace["finished"]
        assert 0 < trace["total_tokens"] < 400


def test_many_at_once_each_have_their_own_trace(http: httpx.Client, model: str) -> None:
    replies: dict[int, dict[str, Any]] = {}

    def ask(number: int) -> None:
        replies[number] = chat(http, model, max_tokens=5 + number, ignore_eos=True, temperature=1.0).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for number, reply in replies.items():
        assert http.get(f"/v1/metis/traces/{reply['id']}").json()["total_tokens"] == 5 + number
    assert len(replies) == 12


def test_an_unwatched_request_has_no_trace(http: httpx.Client, model: str) -> None:
    reply = chat(http, model, max_tokens=4, vllm_xargs={"metis": 0}).json()
    assert http.get(f"/v1/metis/traces/{reply['id']}").status_code == 404


def test_chat_asks_once_and_reports(session: Session) -> None:
    done = sparkray(
        "chat", "--url", str(session.serve_url), "-q", "What is the capital of France?", "--temperature", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "mean entropy" in done.stdout


def test_chat_says_when_nobody_answers() -> None:
    done = sparkray("chat", "--url", f"http://127.0.0.1:{free_port()}", "-q", "x")
    assert done.returncode == 3
    assert "no server answers" in done.stderr


def test_status_lists_the_session(session: Session) -> None:
    rows = json.loads(sparkray("serve", "status", "--json").stdout)["sessions"]
    assert [(row["name"], row["state"]) for row in rows] == [(NAME, "serving")]


def test_a_second_server_on_the_port_or_of_the_name_is_refused(session: Session) -> None:
    port = str(session.serve_url).rpartition(":")[2]
    taken = sparkray("serve", "up", "--port", port, "--name", "second")
    assert (taken.returncode, "in use" in taken.stderr) == (3, True), taken.stderr
    demo = sparkray("demo", "--port", port)
    assert (demo.returncode, "in use" in demo.stderr) == (3, True), demo.stderr
    named = sparkray("serve", "up", "--port", str(free_port()), "--name", NAME)
    assert (named.returncode, "already running" in named.stderr) == (3, True), named.stderr
    assert [row["name"] for row in json.loads(sparkray("serve", "status", "--json").stdout)["sessions"]] == [NAME]


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["--model", "./no-such-folder"], 4, "no-such-folder"),
        (["--set", "engine.kv_cache_gib=100000"], 3, "GiB are free"),
        (["--set", "metis.detector=clever"], 2, "metis.detector"),
        (["--config", "missing.toml"], 2, "missing.toml"),
        (["--port", "99999"], 2, "port"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_start_that_cannot_work_is_refused_before_anything_runs(
    state: Path, arguments: list[str], code: int, fragment: str
) -> None:
    done = sparkray("serve", "up", "--name", "refused", "--port", str(free_port()), *arguments)
    assert done.returncode == code, done.stderr
    assert fragment in done.stderr
    assert not (state / "sessions" / "refused.json").exists()


def test_ctrl_c_while_starting_leaves_nothing(state: Path) -> None:
    command = [SPARKRAY, "serve", "up", "--name", "stopped", "--port", str(free_port()), *SMALL]

    def heed_interrupts() -> None:
        # Tests that a shell started in the background ignore them, and what they start would too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        record = state / "sessions" / "stopped.json"
        wait_for(lambda: record.exists() and find_session("stopped").pid > 0, "a head process is recorded")
        mark = find_session("stopped").mark
        assert marked(mark) != []
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert marked(mark) == []
    assert not record.exists()
