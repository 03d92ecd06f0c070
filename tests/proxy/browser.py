"""A headless Chromium, spoken to over a pipe in its DevTools protocol: no network, no further package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OFF = ("background-networking", "component-update", "sync", "gpu", "quic", "dev-shm-usage")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--remote-debugging-pipe",
    *(f"--disable-{x}" for x in OFF),
]


class Page:
    """One tab."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._held, self._number = to, back, b"", 0
        self.session: str | None = None
        self.log: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its result; what the page logs meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.log.append(json.dumps(answer["params"]))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._back], [], [], 20)[0], "the browser does not answer"
            self._held += os.read(self._back, 1 << 16)
        line, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        told = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, script: str, limit_s: float = 15) -> None:
        """Until an expression is true."""
        end = time.monotonic() + limit_s
        while not self.run(script):
            assert time.monotonic() < end, f"{script} did not become true; {self.log}"
            time.sleep(0.02)

    def go(self, url: str, width: int = 1280, height: int = 800, mobile: bool = False) -> None:
        """Open an address in a window of that size."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.ask("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press_enter(self) -> None:
        """The key."""
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def click(self, selector: str) -> None:
        """In the middle of an element, with the mouse."""
        box = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """A screenshot."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with an empty profile; the test is skipped where none is installed."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium is installed ({', '.join(NAMES)}); the page is tested where there is one")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    command = ["bash", "-c", 'exec "$@" 3<&"$IN" 4>&"$OUT"', "bash", program, *FLAGS, f"--user-data-dir={folder}"]
    environment = {**os.environ, "IN": str(theirs_in), "OUT": str(theirs_out)}
    process = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_out, ours_in)
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours_in)
        os.close(ours_out)
