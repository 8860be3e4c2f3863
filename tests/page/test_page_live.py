"""The page in front of the real server and the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from browser import Browser
from live_server import Server, eventually


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server("--kv-cache-memory", "8MiB").wait_ready()
    yield started
    assert started.stop() == 0


def number(browser: Browser, index: int) -> float:
    text = browser.evaluate(f"document.querySelectorAll('.legend span')[{index}].innerText")
    return float(text.replace(",", "") or 0)


def test_a_newcomer_chats_and_the_counters_move(browser: Browser, server: Server):
    browser.open(server.url)
    browser.until("document.querySelector('#state').dataset.state === 'ready'")
    assert browser.evaluate("document.querySelector('#model').value") == "quire-demo"
    before = number(browser, 1)
    browser.evaluate("document.querySelectorAll('.chip')[1].click()")
    browser.until("document.querySelector('.turn:last-child .meta')?.innerText.includes('tokens')")
    browser.until("document.querySelector('#stop').hidden")
    assert browser.text(".turn:last-child .prose") == "12 + 30 = 42."
    browser.until("document.querySelector('.cells dd').innerText.endsWith('s')")  # the first token
    browser.until(f"Number(document.querySelectorAll('.legend span')[1].innerText) > {before}")
    browser.until("document.querySelector('.curve .line').getAttribute('d').length > 10")
    assert {url.startswith((server.url, "about:")) for url in browser.requested} == {True}


def test_a_long_answer_is_stopped_on_the_server(browser: Browser, server: Server):
    browser.open(server.url)
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type("Tell me a story")
    aborted = 'quire_requests_total{finish_reason="abort"}'
    before = server.metrics()[aborted]
    browser.press("Enter")
    browser.until("document.querySelector('.turn:last-child .prose')?.innerText.length > 5")
    stopped = browser.evaluate(
        "(() => { const s = document.querySelector('#stop'); if (s.hidden) return false;"
        "s.click(); return true; })()"
    )
    browser.until("document.querySelector('#stop').hidden")
    if stopped:  # else the story was shorter than one look at the page
        browser.until("document.querySelector('.turn:last-child .meta').innerText.includes('stop')")
        eventually(lambda: server.metrics()[aborted] > before, "the request is counted as aborted")


def test_a_tool_is_called_and_its_result_told(browser: Browser, server: Server):
    browser.open(server.url)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "Weather", "parameters": parameters}
    tools = json.dumps(json.dumps([{"type": "function", "function": function}]))
    browser.evaluate(
        f"{{ const f = document.querySelector('[name=tools]'); f.value = {tools};"
        "f.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type("What is the weather in Paris?")
    browser.press("Enter")
    browser.until("document.querySelector('.turn:last-child .send-results')")
    assert browser.text(".turn:last-child .call-name") == "get_weather"
    assert json.loads(browser.text(".turn:last-child .call pre")) == {"city": "Paris"}
    browser.click(".turn:last-child .call textarea")
    browser.type("18 degrees and sunny")
    browser.click(".turn:last-child .send-results button")
    browser.until(
        "document.querySelectorAll('.turn').length === 3"
        " && document.querySelector('#stop').hidden"
        " && document.querySelector('.turn:last-child .prose').innerText"
    )
    assert browser.text(".turn:last-child .error") == ""
    browser.click("#reset")


def test_thinking_is_turned_on(browser: Browser, server: Server):
    browser.open(server.url)
    browser.until("document.querySelector('option')")
    browser.evaluate("document.querySelector('[name=thinking][value=on]').click()")
    browser.evaluate("document.querySelectorAll('.chip')[1].click()")
    browser.until("document.querySelector('.turn:last-child .meta')?.innerText.includes('tokens')")
    browser.until("document.querySelector('#stop').hidden")
    thought = browser.evaluate("document.querySelector('.turn:last-child .thought').textContent")
    assert thought == "2 + 0 = 2, then 1 + 3 = 4."
    assert browser.text(".turn:last-child .prose") == "12 + 30 = 42."
    browser.click("#reset")
