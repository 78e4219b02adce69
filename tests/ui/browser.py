"""A headless Chromium, driven through the pipe that it opens for its own developer tools. Needs no driver, no package.

`--remote-debugging-pipe`: JSON messages of the DevTools protocol, each ended by a zero byte, on descriptors 3 (to the
browser) and 4 (from it). The browser ends when the pipe is closed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

_PLUMBING: Final = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS: Final = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--no-first-run", "--no-default-browser-check", "--hide-scrollbars"),
)
_STEP: Final = 0.1


def chromium() -> str | None:
    """Where Chromium or Chrome is, None when there is none."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    return next(filter(None, found), None)


class Browser:
    """One browser with one page.

    Args:
        executable: see `chromium`. profile: an empty folder. width, height: of the window, in pixels.
        storage: what the page finds in its local storage.
        timeout: seconds that any one thing may take.
    """

    def __init__(
        self,
        executable: str,
        profile: Path,
        *,
        width: int = 1280,
        height: int = 900,
        storage: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._timeout = timeout
        self._numbers = iter(range(1, sys.maxsize))
        self._buffer = b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _PLUMBING, str(theirs_in), str(theirs_out), executable, *_FLAGS),
                *(f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        try:
            pages = [one for one in self._send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
            attached = self._send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
            self._session = attached["sessionId"]
            self._send("Page.enable")
            items = "".join(
                f"localStorage.setItem({json.dumps(k)}, {json.dumps(v)});" for k, v in (storage or {}).items()
            )
            self._send("Page.addScriptToEvaluateOnNewDocument", source=f"try {{ {items} }} catch (e) {{}}")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Set the size of the page in pixels, and by how much pictures of it are larger or smaller."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._send("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, url: str) -> None:
        """Load a page afresh."""
        self._send("Page.navigate", url="about:blank")  # else only the part behind the # would change
        self._send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """What a JavaScript expression evaluates to."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self) -> str:
        """What the page says, blanks and line ends as single blanks."""
        return " ".join(str(self.run("document.body ? document.body.innerText : ''")).split())

    def wait_for(self, *words: str | re.Pattern[str]) -> str:
        """Wait until the page says all of this, word by word or by a pattern; returns everything it says."""
        until = time.monotonic() + self._timeout
        while True:
            said = self.text()
            missing = [one for one in words if not (one in said if isinstance(one, str) else one.search(said))]
            if not missing:
                return said
            assert time.monotonic() < until, f"the page never said {missing}, but: {said}"
            time.sleep(_STEP)

    def click(self, what: str) -> None:
        """Click, as a mouse does, the first innermost element whose whole text this is, or `[...]`: a CSS selector.

        Waits until there is one.
        """
        selected = what.startswith("[")
        wanted = "true" if selected else f"(e.innerText || '').trim() === {json.dumps(what)}"
        script = (
            f"(() => {{ const found = [...document.querySelectorAll({json.dumps(what if selected else '*')})]"
            f".filter(e => {wanted} && e.getClientRects().length);"
            "const one = found.find(e => !found.some(o => o !== e && e.contains(o))); if (!one) return null;"
            "one.scrollIntoView({block: 'nearest'}); const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        until = time.monotonic() + self._timeout
        while (place := self.run(script)) is None:
            assert time.monotonic() < until, f"there was never anything to click: {what!r}"
            time.sleep(_STEP)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Save what the window shows as PNG, once two pictures in a row are the same: charts are drawn gradually."""
        before, until = b"", time.monotonic() + 10.0
        while True:
            now = base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"])
            if now == before or time.monotonic() > until:
                path.write_bytes(now)
                return
            before = now
            time.sleep(_STEP * 5)

    def close(self) -> None:
        """End the browser and all its processes. Can be called again."""
        if self._process.poll() is None:
            with contextlib.suppress(AssertionError, OSError):
                self._session = None
                self._send("Browser.close")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(5.0)
        for descriptor in (self._in, self._out):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self._timeout
        while True:
            answer = self._receive(until, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, until: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium did not answer {method} within {self._timeout} s"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, f"Chromium ended before it answered {method}"
            self._buffer += chunk
        one, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(one)
        return answer
