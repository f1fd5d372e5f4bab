"""Headless Chromium over its DevTools pipe: what a page shows, asks for and runs. Needs nothing but the browser."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    # Nothing leaves the machine, whatever a page or the browser itself asks for.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
SECONDS = 20.0
"""The longest that one answer may take."""


def find_browser() -> str | None:
    """The browser's program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One open page, with all that happened on it since it was opened."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> Any:
        """One DevTools command for this page."""
        return self._browser.call(method, session=self._session, **params)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth on the page. It is asked from outside: the page's policy does not hold it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self) -> str:
        """All text that is shown once everything is unfolded, as lines are laid out."""
        self.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        return str(self.value("document.body.innerText"))

    def resize(self, width: int, height: int = 900) -> None:
        """Lay the page out anew, as wide as a screen of so many pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """What the page reported, of some kinds."""
        self.value("1")
        return [e["params"] for e in self._browser.events if e.get("sessionId") == self._session and e["method"] in methods]

    def complaints(self) -> list[str]:
        """Messages on the console, errors and breaches of the policy, and windows that ask something."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
        return [json.dumps(one) for one in self.events(*kinds)]

    def requests(self) -> list[str]:
        """The addresses of all that was asked for."""
        return [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]


class Browser:
    """A running browser."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._buffer, self._last = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, *, session: str | None = None, **params: Any) -> Any:
        """One DevTools command; what happens in the meantime is kept in `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self._heard(answer)

    def _heard(self, event: dict[str, Any]) -> None:
        if "method" not in event:
            return
        self.events.append(event)
        if event["method"] == "Page.javascriptDialogOpening":
            # Until it is answered the page stands still.
            answer = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}, "sessionId": event["sessionId"]}
            os.write(self._send, json.dumps(answer).encode() + b"\0")

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._receive, 1 << 16)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, file: Path, width: int = 1200) -> Page:
        """Open a file and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width)
        page.call("Page.navigate", url=file.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not page.events("Page.loadEventFired"):
            assert time.monotonic() < end, "the page does not load"
        return page


@contextmanager
def running(program: str, folder: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own, and end it.

    Args:
        program: the browser's program.
        folder: for the profile.
    """
    to_read, send = os.pipe()
    receive, to_write = os.pipe()
    # The browser reads commands from descriptor 3 and writes answers to 4, so its ends must first be out of that way.
    ends = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_read, to_write)]
    # Chromium refuses its sandbox to the super-user.
    flags = [*FLAGS, f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    command = [sys.executable, "-c", LAUNCH, *map(str, ends), program, *flags, "about:blank"]
    with (folder.parent / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=ends, stdout=log, stderr=log)
    for one in (to_read, to_write, *ends):
        os.close(one)
    browser = Browser(send, receive)
    try:
        yield browser
    finally:
        # Closing the pipe ends it, and so all processes it started.
        os.close(send)
        os.close(receive)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
