"""Chromium without a screen, driven through chromedriver's WebDriver interface."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 30
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "ArrowUp": "\ue013",
    "Control": "\ue009",
    "ArrowLeft": "\ue012",
    "Home": "\ue011",
}


def is_there() -> bool:
    return bool(shutil.which("chromedriver") and shutil.which("chromium"))


class Browser:
    """One window. Everything waits until it is there, or fails."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = httpx.post(self._session + path, json=body or {}, timeout=PATIENCE_S)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]

    def open(self, address: str) -> None:
        self.call("/url", {"url": address})

    def run(self, script: str, *args: Any) -> Any:
        return self.call("/execute/sync", {"script": script, "args": list(args)})

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the page itself, not of the window around it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": phone}
        body = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self.call("/goog/cdp/execute", body)

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        body = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self.call("/goog/cdp/execute", body)

    def type(self, selector: str, text: str) -> None:
        element = self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.call(f"/element/{element}/value", {"text": text})

    def press(self, *keys: str) -> None:
        codes = [KEYS.get(key, key) for key in keys]
        downs = [{"type": "keyDown", "value": code} for code in codes]
        ups = [{"type": "keyUp", "value": code} for code in reversed(codes)]
        self.call("/actions", {"actions": [{"type": "key", "id": "k", "actions": downs + ups}]})

    def click(self, selector: str) -> None:
        element = self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.call(f"/element/{element}/click")

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def wait(self, condition: str, *args: Any) -> Any:
        """Until the JavaScript expression is true."""
        ends = time.monotonic() + PATIENCE_S
        while not (value := self.run(f"return {condition}", *args)):
            assert time.monotonic() < ends, f"never: {condition}"
            time.sleep(0.03)
        return value

    def screenshot(self, file: Path) -> None:
        reply = httpx.get(self._session + "/screenshot", timeout=PATIENCE_S)
        file.write_bytes(base64.b64decode(reply.json()["value"]))


@contextmanager
def browser(width: int = 1280, height: int = 860) -> Iterator[Browser]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    base = f"http://127.0.0.1:{port}"
    try:
        _wait_for(base)
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            "binary": shutil.which("chromium"),
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        reply = httpx.post(base + "/session", json=wanted, timeout=PATIENCE_S)
        assert reply.status_code == 200, reply.text
        session = f"{base}/session/{reply.json()['value']['sessionId']}"
        window = Browser(session)
        window.resize(width, height)
        try:
            yield window
        finally:
            httpx.delete(session, timeout=PATIENCE_S)
    finally:
        driver.terminate()
        driver.wait(PATIENCE_S)


def _wait_for(base: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(base + "/status", timeout=1)
            return
        except httpx.TransportError:
            assert time.monotonic() < ends, "chromedriver did not start"
            time.sleep(0.05)
