"""Headless Chromium over its DevTools protocol, with the standard library alone: pages are loaded, keyed and clicked."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --mute-audio --remote-debugging-pipe --window-size=1400,900"
)
KEYS = {
    "Escape": 27, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9,
}  # fmt: skip
LONGEST = 60.0  # seconds until a page is given up


def binary() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `problems` collects errors of the console, uncaught exceptions, refused loads, and dialogs."""

    def __init__(self, home: Path) -> None:
        from_here, to_page = os.pipe()
        from_page, to_here = os.pipe()
        # The browser reads its orders from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3<&{from_here} 4>&{to_here}'
        own = {**os.environ, "HOME": str(home)}
        own.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen(
            ["bash", "-c", shell, str(binary()), *FLAGS.split(), f"--user-data-dir={home}/profile", "about:blank"],
            pass_fds=(from_here, to_here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own,
        )  # fmt: skip
        os.close(from_here)
        os.close(to_here)
        self.to_page, self.from_page = to_page, from_page
        self.buffer, self.number = b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to_page)
        os.close(self.from_page)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.to_page, json.dumps(order).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def receive(self) -> dict[str, Any]:
        """The next message; of events what went wrong is kept."""
        end = time.monotonic() + LONGEST
        while b"\0" not in self.buffer:
            if not select.select([self.from_page], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.from_page, 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            self.problems.append(str(params))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        if method:
            self.events.append(message)
        return message

    def open(self, address: str) -> None:
        """Load a page and wait until its load event."""
        self.events.clear()
        self.send("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until the expression holds."""
        end = time.monotonic() + LONGEST
        while not self.run(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def key(self, *keys: str) -> None:
        for key in keys:
            text = {"text": "\r"} if key == "Enter" else {} if key in KEYS else {"text": key}
            code = {"windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of the first element that the selector finds."""
        chosen = json.dumps(selector)
        self.run(f'document.querySelector({chosen}).scrollIntoView({{ block: "center" }})')
        x, y = self.run(f"""(() => {{ const r = document.querySelector({chosen}).getBoundingClientRect();
            return [r.left + r.width / 2, r.top + r.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Set a select box as a person would, with its change event."""
        self.run(f"""(() => {{ const box = document.querySelector({json.dumps(selector)});
            box.value = {json.dumps(value)};
            box.dispatchEvent(new Event("change", {{ bubbles: true }})); }})()""")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
