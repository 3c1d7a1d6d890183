"""A headless Chromium that tests tell what to do, by the DevTools protocol over two pipes.

No port is opened and nothing of the user's profile is touched.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from tests.harness import PATIENCE
from tests.tools import require_tool

# Chromium reads commands from descriptor 3 and answers on 4; the file descriptors above are its own business.
_LAUNCHER = (
    "import os, sys; read, write = int(sys.argv[1]), int(sys.argv[2]); "
    "os.dup2(read, 3); os.dup2(write, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root otherwise, which CI is
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Browser:
    """A browser process.  Use it as a context manager."""

    def __init__(self) -> None:
        program = require_tool("chromium")
        self._profile = TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self._log = (Path(self._profile.name) / "stderr").open("wb")
        commands_read, self._commands = os.pipe()
        self._answers, answers_write = os.pipe()
        # Numbers that the launcher's own two do not run into.
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 20) for each in (commands_read, answers_write)]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _LAUNCHER, str(high[0]), str(high[1])),
                *(program, *_OPTIONS, f"--user-data-dir={self._profile.name}/profile", "about:blank"),
            ],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        for each in (commands_read, answers_write, *high):
            os.close(each)
        self._sent = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._log.close()
        self._profile.cleanup()

    def tell(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Give a command; return its result.  Events that come meanwhile are kept."""
        self._sent += 1
        command = {"id": self._sent, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive(method)
            if message.get("id") == self._sent:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """Return the next event of a kind."""
        while True:
            for index, event in enumerate(self.events):
                if event.get("method") == method and event.get("sessionId") == session:
                    del self.events[index]
                    return event
            self.events.append(self._receive(method))

    def _receive(self, what: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                log = Path(self._log.name).read_text(errors="replace")
                raise AssertionError(f"no answer to {what} from the browser; it said:\n{log[-2000:]}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


class Tab:
    """A page in a browser, of a given width in CSS pixels, with or without JavaScript, in a time zone."""

    def __init__(
        self, browser: Browser, width: int, *, javascript: bool = True, dark: bool = False, zone: str = "UTC"
    ) -> None:
        self._browser = browser
        target = browser.tell("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self._session = browser.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._tell(f"{domain}.enable")
        self._tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self._tell("Emulation.setScriptExecutionDisabled", value=not javascript)
        self._tell("Emulation.setTimezoneOverride", timezoneId=zone)
        scheme = "dark" if dark else "light"
        self._tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.tell("Target.closeTarget", targetId=self._target)

    def open(self, url: str) -> None:
        """Load a page, and wait until it is there."""
        self._tell("Page.navigate", url=url)
        self.wait_loaded()

    def wait_loaded(self) -> None:
        """Wait until the next page is there."""
        self._browser.wait_for("Page.loadEventFired", self._session)

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is worth, as JSON."""
        result = self._tell("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    @property
    def text(self) -> str:
        """What a person can read."""
        text: str = self.evaluate("document.body.innerText")
        return text

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        image = self._tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))

    def complaints(self) -> list[str]:
        """Return what the browser found wrong: policies that were broken, exceptions, dialogs."""
        self.evaluate("1")
        bad = ("Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
        return [json.dumps(event["params"]) for event in self._of_this() if event.get("method") in bad]

    def requested(self) -> list[str]:
        """Return the addresses of all that was loaded."""
        return [
            event["params"]["request"]["url"]
            for event in self._of_this()
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def _of_this(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def _tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.tell(method, self._session, **parameters)
