"""Drives a headless Chromium by the DevTools protocol."""

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page of a browser. `problems` collects exceptions and log entries as JSON."""

    def __init__(self, address: str) -> None:
        self.socket, self.number, self.problems = connect(address, max_size=1 << 26), 0, []
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(60))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"]))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, (expression, self.evaluate("document.body.innerText"), self.problems)
            time.sleep(0.05)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


@contextmanager
def browser(width: int = 1280, height: int = 1000) -> Iterator[Browser]:
    """Skips the test if no Chromium is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        options += ["--remote-debugging-port=0", f"--window-size={width},{height}", "--hide-scrollbars"]
        options += ["--disable-dev-shm-usage", "--disable-background-networking", "about:blank"]
        process = subprocess.Popen(
            [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            file, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not (file.exists() and file.read_text().count("\n")):
                assert process.poll() is None and time.monotonic() < deadline, "the browser did not start"
                time.sleep(0.05)
            with urllib.request.urlopen(f"http://127.0.0.1:{file.read_text().split()[0]}/json/list") as reply:
                (page,) = [tab for tab in json.load(reply) if tab["type"] == "page"]
            one = Browser(page["webSocketDebuggerUrl"])
            yield one
            one.socket.close()
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)
