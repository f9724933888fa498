"""The page in a headless browser, on a server that has its files and tells recorded events; no engine is needed.

With `SPARKRAY_SCREENSHOTS` set to a folder the browser's pictures are kept there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import CHROMIUM, DRIVER, MISSING, Browser, no_overlap, open_browser, picture

from sparkray.serving.page import page_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason=MISSING)

EXAMPLE = json.loads((page_folder() / "example.json").read_text(encoding="utf-8"))
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
ENDLESS = "Never stop."
REFUSED = "Refuse this."


class Handler(BaseHTTPRequestHandler):
    """The page's files, and a search that tells the packaged example again."""

    def log_message(self, *_: object) -> None:
        """Nothing is written to the test's output."""

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = page_folder() / name
        if not file.is_file():
            self.send_error(404)
            return
        self.reply(200, TYPES[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["question"] == REFUSED:
            error = {"error": {"message": "the question is refused.", "type": "invalid_request_error"}}
            self.reply(400, "application/json", json.dumps(error).encode())
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in EXAMPLE["events"]:
            if event["kind"] == "done" and body["question"] == ENDLESS:
                time.sleep(20)
                return
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser(height=1000) as opened:
        yield opened


def done(browser: Browser) -> bool:
    return browser.text("#status").startswith("Done")


def test_a_search_is_followed_by_keyboard_alone(browser: Browser, url: str) -> None:
    report = EXAMPLE["events"][-1]["report"]
    browser.go(url)
    browser.press("Tab")
    assert browser.text(":focus") == "Skip to the paths"
    browser.run("document.getElementById('question').focus()")
    browser.press(*"What is 48 + 32?", "Enter")
    browser.wait(lambda: done(browser), "the search ends")
    assert browser.text("#report .final") == report["answer"]
    assert browser.run("return document.querySelectorAll('.lane').length") == report["num_paths"]
    assert browser.text(".vote .name") == report["answer"]
    assert browser.text("#n-tokens") == str(report["num_tokens"])
    # Entropy as colour and CUSUM as line are really drawn.
    pixel = "return document.querySelector('.lane canvas').getContext('2d').getImageData(1, 4, 1, 1).data[3]"
    assert browser.run(pixel) == 255
    assert len(browser.run("return document.querySelector('.lane polyline').getAttribute('points')")) > 10
    no_overlap(browser)
    picture(browser, "search-light")
    browser.run("document.querySelector('.lane').focus()")
    browser.press("Enter")
    assert browser.text(".lane-text") == report["paths"][0]["text"]
    browser.press("ArrowDown")
    assert browser.run("return document.activeElement.dataset.path") == "1"


def test_a_replay_in_the_dark_and_on_a_narrow_screen(browser: Browser, url: str) -> None:
    browser.go(url)
    browser.run("document.getElementById('speed').value = '40'")
    before = browser.run("return document.documentElement.dataset.theme")
    browser.click("#theme")
    assert browser.run("return document.documentElement.dataset.theme") != before
    browser.run("document.documentElement.dataset.theme === 'dark' || document.getElementById('theme').click()")
    browser.click("#replay")
    browser.wait(lambda: done(browser), "the replay ends")
    num_pruned = EXAMPLE["events"][-1]["report"]["num_pruned"]
    assert num_pruned > 0
    assert browser.text("#n-pruned") == str(num_pruned)
    assert browser.run("return document.querySelectorAll('.lane.pruned').length") == num_pruned
    faded = "return getComputedStyle(document.querySelector('.lane.pruned')).opacity"
    browser.wait(lambda: float(browser.run(faded)) < 0.5, "pruned lanes fade")
    assert browser.text("#n-saved") != "0 %"
    no_overlap(browser)
    picture(browser, "search-dark")
    browser.resize(520, 1000)
    no_overlap(browser)
    picture(browser, "search-narrow")
    browser.resize(1280, 1000)


def test_a_search_is_stopped_and_a_refusal_is_said(browser: Browser, url: str) -> None:
    browser.go(url)
    browser.run(f"document.getElementById('question').value = {ENDLESS!r}")
    browser.click("#go")
    browser.wait(lambda: int(browser.text("#n-tokens")) > 0, "the first tokens come")
    browser.press("Escape")
    browser.wait(lambda: browser.text("#status") == "Stopped.", "the search is stopped")
    browser.run(f"document.getElementById('question').value = {REFUSED!r}")
    browser.click("#go")
    browser.wait(lambda: browser.text("#failure") == "the question is refused.", "the refusal is said")
