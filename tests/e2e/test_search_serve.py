"""The search of a served model: over HTTP, from the command line, and on the page in a headless browser.

One server with the embedded model stands for all tests of this file. With `SPARKRAY_SCREENSHOTS` set to a folder the
browser's pictures are kept there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser, no_overlap, open_browser, picture

from sparkray.cluster.processes import free_port, marked
from sparkray.cluster.session import find_session

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(900)]

SPARKRAY = str(Path(sys.executable).with_name("sparkray"))
NAME = "test-search"
SMALL = ["--set", "engine.max_model_len=512", "--set", "engine.max_num_seqs=16", "--set", "engine.kv_cache_gib=0.25"]


def sparkray(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SPARKRAY, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKRAY_STATE", str(tmp_path_factory.mktemp("state")))
        port = free_port()
        up = sparkray("serve", "up", "--port", str(port), "--name", NAME, "--json", *SMALL, timeout=850)
        assert up.returncode == 0, up.stderr
        session = find_session(NAME)
        yield str(session.serve_url)
        assert sparkray("serve", "down", "--name", NAME).returncode == 0
        assert marked(session.mark) == []


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=200) as client:
        yield client


PRODUCT = {"question": "What is 3 * 6?", "task": "products", "num_paths": 6, "max_tokens": 24}


def events_of(text: str) -> list[dict[str, Any]]:
    frames = [frame.removeprefix("data: ") for frame in text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def test_a_search_answers_with_its_report(http: httpx.Client) -> None:
    reply = http.post("/v1/search", json={**PRODUCT, "policy": "full"})
    assert reply.status_code == 200, reply.text
    report = reply.json()
    assert report["answer"] == "18"
    assert "18" in report["best_response"]
    assert report["num_tokens"] == sum(path["num_tokens"] for path in report["paths"])
    assert len(report["paths"]) == 6


def test_a_stream_tells_waves_text_votes_and_the_end(http: httpx.Client) -> None:
    reply = http.post("/v1/search", json={**PRODUCT, "policy": "adaptive_consistency", "wave": 2, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert {event["kind"] for event in events} >= {"wave", "tokens", "vote", "done"}
    assert events[0] == {"kind": "wave", "wave": 0, "paths": [0, 1]}
    report = events[-1]["report"]
    texts: dict[int, str] = {}
    for event in events:
        if event["kind"] == "tokens":
            texts[event["path"]] = texts.get(event["path"], "") + event["text"]
    assert texts == {path["index"]: path["text"] for path in report["paths"]}
    votes = [event for event in events if event["kind"] == "vote"]
    assert votes[-1]["votes"] == [[vote["answer"], vote["weight"]] for vote in report["votes"]]


def test_rounds_over_http(http: httpx.Client) -> None:
    rounds = {"rounds": 2, "shrink": [0.5], "min_paths": [2], "cooling": [0.5]}
    report = http.post("/v1/search", json={**PRODUCT, "policy": "full", "num_paths": 4, "rounds": rounds}).json()
    assert report["policy"] == "iterative full"
    assert report["num_paths"] == 6


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "question"),
        ({"question": "  "}, "the question is empty"),
        ({"question": "why?", "alpha": 1.0}, "alpha"),
        ({"question": "why?", "num_paths": 0}, "num_paths"),
        ({"question": "why?", "task": "zebra"}, "there is no task 'zebra'"),
        ({"question": "why?", "profile": "/etc/passwd"}, "over HTTP the profile is 'packaged'"),
        ({"question": "sea " * 2000}, "leaves no room"),
        ({"question": "why?", "model": "other"}, "other"),
    ],
)
def test_bad_searches_are_refused(http: httpx.Client, body: dict[str, Any], said: str) -> None:
    for stream in (False, True):
        reply = http.post("/v1/search", json={**body, "stream": stream})
        assert 400 <= reply.status_code < 500, reply.text
        assert said in reply.json()["error"]["message"]


def test_a_client_that_goes_away_aborts_all_paths(http: httpx.Client) -> None:
    essay = {"question": "Write down all that you know about the sea.", "num_paths": 8, "max_tokens": 400}
    with http.stream("POST", "/v1/search", json={**essay, "policy": "full", "stream": True}) as reply:
        for line in reply.iter_lines():
            if '"tokens"' in line:
                break
    deadline = time.monotonic() + 60
    while running(http):
        assert time.monotonic() < deadline, "paths of a search without a client still run"
        time.sleep(0.2)


def running(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_the_command_line_searches_on_a_server(url: str, tmp_path: Path) -> None:
    kept = tmp_path / "search.json"
    done = sparkray(
        "search", "What is 3 * 6?", "--url", url, "--task", "products", "--paths", "4", "--save", str(kept), "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["answer"] == "18"
    assert json.loads(kept.read_text())["events"][-1]["report"] == report


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(MISSING)
    with open_browser() as opened:
        yield opened


def test_a_live_search_on_the_page(browser: Browser, url: str) -> None:
    browser.go(url)
    assert browser.run("return document.activeElement.tagName") == "BODY"
    # By keyboard alone: the skip link comes first, the question's field takes text, Enter searches.
    browser.press("Tab")
    assert browser.text(":focus") == "Skip to the paths"
    browser.run("document.getElementById('task').value = 'products'; document.getElementById('paths').value = 6")
    browser.run("document.getElementById('policy').value = 'full'; document.getElementById('question').focus()")
    browser.press(*"What is 3 * 6?", "Enter")
    browser.wait(lambda: browser.text("#status").startswith("Done"), "the search ends")
    assert browser.text("#status") == "Done: 18."
    assert browser.text("#report .final") == "18"
    assert browser.run("return document.querySelectorAll('.lane').length") == 6
    assert browser.text(".vote .name") == "18"
    assert browser.text("#n-paths") == "6/6"
    assert int(browser.text("#n-tokens")) > 6
    # Entropy as colour and CUSUM as line are really drawn.
    drawn = (
        "const c = document.querySelector('.lane canvas'); return c.getContext('2d').getImageData(1, 4, 1, 1).data[3]"
    )
    assert browser.run(drawn) == 255
    assert len(browser.run("return document.querySelector('.lane polyline').getAttribute('points')")) > 10
    no_overlap(browser)
    picture(browser, "search-live")
    # A lane opens by keyboard and shows its text.
    browser.run("document.querySelector('.lane').focus()")
    browser.press("Enter")
    assert browser.text(".lane-text").strip()
    browser.press("ArrowDown")
    assert browser.run("return document.activeElement.dataset.path") == "1"
    assert browser.errors() == []


def test_a_replay_on_the_page_in_the_dark(browser: Browser, url: str) -> None:
    browser.go(url)
    browser.run("document.getElementById('speed').value = '40'")
    before = browser.run("return document.documentElement.dataset.theme")
    browser.click("#theme")
    assert browser.run("return document.documentElement.dataset.theme") != before
    if before == "dark":
        browser.click("#theme")
        browser.click("#theme")
    browser.run("document.documentElement.dataset.theme === 'dark' || document.getElementById('theme').click()")
    browser.click("#replay")
    browser.wait(lambda: browser.text("#status").startswith("Done"), "the replay ends", 60)
    pruned = int(browser.text("#n-pruned"))
    assert pruned == browser.run("return document.querySelectorAll('.lane.pruned').length")
    assert pruned > 0
    assert float(browser.run("return getComputedStyle(document.querySelector('.lane.pruned')).opacity")) < 1
    assert browser.text("#n-saved") != "0 %"
    no_overlap(browser)
    picture(browser, "search-replay-dark")
    browser.resize(420, 900)
    no_overlap(browser)
    picture(browser, "search-narrow")
    browser.resize(1280, 900)
    assert browser.errors() == []


def test_a_search_on_the_page_can_be_stopped_and_failures_are_said(browser: Browser, url: str) -> None:
    browser.go(url)
    browser.run("document.getElementById('question').value = 'Write down all that you know about the sea.'")
    browser.run("document.getElementById('policy').value = 'full'; document.getElementById('tokens').value = 400")
    browser.click("#go")
    browser.wait(lambda: int(browser.text("#n-tokens")) > 0, "the first tokens come")
    browser.press("Escape")
    browser.wait(lambda: browser.text("#status") == "Stopped.", "the search is stopped", 30)
    browser.run("document.getElementById('question').value = 'sea '.repeat(2000)")
    browser.click("#go")
    browser.wait(lambda: "leaves no room" in browser.text("#failure"), "the failure is said", 60)
