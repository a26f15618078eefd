"""The page in a real browser: what a person sees and does. `pytest -m browser`.

With OPENM1_SCREENSHOTS naming a folder, the pictures of the documentation are written there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Browser, browser, is_there
from .running import ANSWER, QUESTION, THOUGHT, Running

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not is_there(), reason="needs chromium and chromedriver"),
]
BITS = "How many 1 bits are there in the binary representation of the number 907273204?"
PICTURES = os.environ.get("OPENM1_SCREENSHOTS")
TOOL = {
    "type": "function",
    "function": {
        "name": "count_bits",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def page(server: Running) -> Iterator[Browser]:
    with browser() as window:
        window.prefer("light")
        window.open(server.address + "/")
        window.wait("document.querySelector('.tries button')")
        yield window


def picture(page: Browser, name: str) -> None:
    if PICTURES:
        page.run("document.activeElement.blur()")
        time.sleep(0.6)  # For colours that are still on their way.
        page.screenshot(Path(PICTURES) / f"page-{name}.png")


def ask(page: Browser, text: str) -> None:
    """Types a question and waits for the whole reply."""
    before = page.run("return document.querySelectorAll('.stats').length")
    page.type("#text", text)
    page.press("Enter")
    page.wait("document.querySelectorAll('.stats').length > arguments[0] && !running", before)


def test_a_chat_shows_its_thought_and_keeps_itself(page: Browser) -> None:
    ask(page, QUESTION)
    assert page.text(".answer") == ANSWER
    label = page.text(".thought summary")
    assert label.startswith("Thought for") and label.endswith("9 tokens")
    assert not page.run("return document.querySelector('.thought').open")
    page.click(".thought summary")
    assert page.text(".thought .text") == THOUGHT
    assert "13 tokens" in page.text(".stats") and "prompt tokens from the cache" in page.text(
        ".stats"
    )
    ask(page, BITS)
    page.run("document.querySelectorAll('.thought summary')[1].click()")
    page.wait("document.getElementById('states-n').innerText.includes('kept')")
    page.wait("document.querySelectorAll('#pages i.kept').length > 0")
    assert "%" in page.text("#hits-n")
    picture(page, "chat")
    page.run("location.reload()")
    page.wait("document.querySelectorAll('.turn').length === 4")
    assert page.text(".answer") == ANSWER
    assert QUESTION in page.text("#chats")


def test_a_reply_comes_in_pieces_and_can_be_stopped_and_tried_again(
    page: Browser, server: Running
) -> None:
    page.run("settings.max_tokens = '200000'; settings.temperature = '2'")
    page.run(
        "window.requestBodyOf = requestBody; requestBody = (turns) => "
        "({...requestBodyOf(turns), ignore_eos: true})"
    )
    page.type("#text", QUESTION)
    page.press("Enter")
    first = page.wait("running && running.turn.text.length + (running.turn.thought||'').length")
    page.wait("running.turn.text.length + (running.turn.thought||'').length > arguments[0]", first)
    assert page.run("return document.getElementById('send').ariaLabel") == "Stop"
    page.press("Escape")
    page.wait("!running")
    assert page.text(".note") == "Stopped."
    server.check_idle()
    page.run("settings.temperature = '0'; requestBody = requestBodyOf")
    page.click(".turn.assistant .icon:nth-child(2)")
    page.wait("!running && document.querySelector('.answer').innerText === arguments[0]", ANSWER)


def test_the_slider_bounds_the_thought(page: Browser) -> None:
    page.run("const s = document.getElementById('budget'); s.value = 1; s.oninput()")
    assert page.text("#budget-n") == "4 tokens"
    ask(page, QUESTION)
    assert page.text(".thought summary").endswith("4 tokens")
    page.run("const s = document.getElementById('budget'); s.value = 0; s.oninput()")
    assert page.text("#budget-n") == "off"


def test_tool_calls_are_shown_and_answered(page: Browser) -> None:
    page.run(
        "settings.tools = arguments[0]; settings.tool_choice = 'required';"
        "window.requestBodyOf = requestBody; requestBody = (turns) => "
        "({...requestBodyOf(turns), parallel_tool_calls: false})",
        json.dumps([TOOL]),
    )
    ask(page, QUESTION)
    assert "count_bits" in page.text(".call") and '"number"' in page.text(".call pre")
    picture(page, "tool-call")
    page.type(".call input", "2")
    page.run("settings.tool_choice = 'none'")
    page.click(".call form button")
    page.wait("document.querySelectorAll('.turn.assistant').length === 2 && !running")
    assert page.text(".call .result") == "2"
    assert not page.run("return document.querySelector('.error')?.innerText")


def test_files_are_counted_before_they_are_sent(page: Browser, tmp_path: Path) -> None:
    page.run(
        "const drop = new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true});"
        "drop.dataTransfer.items.add(new File(['hello '.repeat(100)], 'notes.txt'));"
        "drop.dataTransfer.items.add(new File([new Uint8Array([255, 254])], 'photo.jpg'));"
        "document.body.dispatchEvent(drop)"
    )
    page.wait("files.length === 2 && files.every((f) => f.error || f.tokens)")
    assert "600 tokens" in page.text("#files") and "not a text file" in page.text("#files")
    assert page.run("return document.getElementById('send').disabled")
    page.run("document.querySelectorAll('#files button')[1].click()")
    ask(page, "What is it?")
    assert "notes.txt" in page.text(".turn.user .files")
    sent = page.run("return toMessages(chat.turns)[0].content")
    assert sent.startswith("notes.txt:\n\nhello") and sent.endswith("What is it?")


def test_errors_are_told_where_they_happen(page: Browser) -> None:
    page.run("settings.tools = '[{]'")
    ask(page, QUESTION)
    assert "no JSON" in page.text(".error")
    page.run("settings.tools = ''; settings.max_tokens = '99999999999'")
    page.click(".turn.assistant .icon:nth-child(2)")
    page.wait("document.querySelector('.error')?.innerText.includes('10240000 together')")


def test_the_keyboard_is_enough(page: Browser) -> None:
    ask(page, QUESTION)
    page.press("Control", "k")
    page.wait("document.querySelector('.start')")
    ask(page, BITS)
    page.press("ArrowUp")
    page.wait("document.getElementById('text').value === arguments[0]", BITS)
    page.run("document.activeElement.blur()")
    page.press("/")
    assert page.run("return document.activeElement.id") == "text"


def test_dark_and_phone(page: Browser) -> None:
    ask(page, BITS)
    page.click(".thought summary")
    light = page.run("return getComputedStyle(document.body).backgroundColor")
    page.prefer("dark")
    page.wait("getComputedStyle(document.body).backgroundColor !== arguments[0]", light)
    picture(page, "dark")
    page.click("#theme")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == light
    page.resize(390, 844, phone=True)
    page.wait("getComputedStyle(document.getElementById('menu')).display !== 'none'")
    assert page.run("return document.documentElement.scrollWidth") == 390
    picture(page, "phone")
    page.click("#menu")
    page.wait("document.body.classList.contains('nav')")


def test_nothing_comes_from_elsewhere(page: Browser, server: Running) -> None:
    ask(page, QUESTION)
    loaded = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert loaded and all(name.startswith((server.address, "data:")) for name in loaded)
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_text_of_the_model_is_no_html(page: Browser) -> None:
    text = "<img src=x onerror=alert(1)> **bold** `code`\n\n```python\n1 < 2\n```\n\n- one\n- two"
    html = page.run("return rich(arguments[0]).innerHTML", text)
    assert "<img" not in html and "<strong>bold</strong>" in html and "<li>two</li>" in html
    assert "<pre><code>1 &lt; 2</code></pre>" in html
