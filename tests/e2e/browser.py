"""A headless Chromium, driven through its driver's own HTTP interface (W3C WebDriver), so that no client is needed."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sparkray.cluster.processes import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "Chromium or its driver is not installed (Debian: apt-get install chromium chromium-driver)"
# Where a person wants to look: a folder for the screenshots.
PICTURES = os.environ.get("SPARKRAY_SCREENSHOTS")
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "ArrowDown": "\ue015", "Space": " "}


@dataclass(frozen=True)
class Browser:
    """One tab."""

    http: httpx.Client
    session: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = self.http.request(method, f"/session/{self.session}{path}", json=body if method == "POST" else None)
        value = reply.json()["value"]
        assert reply.status_code == 200, value
        return value

    def go(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript function's body."""
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({selector!r}).textContent"))

    def click(self, selector: str) -> None:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def press(self, *keys: str) -> None:
        """Real key presses, to whatever has the focus."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
            time.sleep(0.1)

    def resize(self, width: int, height: int) -> None:
        self.call("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def errors(self) -> list[str]:
        """What the page wrote to the console as errors."""
        return [
            entry["message"]
            for entry in self.call("POST", "/se/log", {"type": "browser"})
            if entry["level"] == "SEVERE"
        ]


@contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Start driver and browser, and end both with the block."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    arguments = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ]
    options = {"binary": CHROMIUM, "args": arguments}
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.get("/status")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline, "the driver did not start"
                    time.sleep(0.1)
            made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            browser = Browser(client, made["sessionId"])
            try:
                yield browser
            finally:
                client.delete(f"/session/{browser.session}")
    finally:
        driver.terminate()
        driver.wait(30)


def picture(browser: Browser, name: str) -> None:
    if PICTURES:
        browser.screenshot(Path(PICTURES) / f"{name}.png")


def no_overlap(browser: Browser) -> None:
    """Nothing sticks out of the window, and no two parts of a lane or of the form lie on each other."""
    found = browser.run(
        """
        const boxes = (nodes) => [...nodes].map((node) => node.getBoundingClientRect()).filter((box) => box.width);
        const crossing = (all) => all.some((one, at) => all.slice(at + 1).some((other) =>
          one.left < other.right - 1 && other.left < one.right - 1
          && one.top < other.bottom - 1 && other.top < one.bottom - 1));
        const lanes = [...document.querySelectorAll(".lane")].some((lane) => crossing(boxes(lane.children)));
        const form = crossing(boxes(document.querySelectorAll("form label:not([hidden]), form button")));
        const sections = crossing(boxes(document.querySelectorAll("header, form, .figures, #lanes, #votes")));
        return {lanes, form, sections, wide: document.documentElement.scrollWidth > innerWidth};
        """
    )
    assert found == {"lanes": False, "form": False, "sections": False, "wide": False}
