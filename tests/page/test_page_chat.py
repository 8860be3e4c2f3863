"""What a person does with the page: chats, stops, edits, comes back, gives a key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from browser import PATIENCE, Browser
from scripted_page_server import MODEL, ScriptedApi, call, text

LAST = ".turn:last-child"
IDLE = "document.querySelector('#stop').hidden"


def send(browser: Browser, message: str) -> None:
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type(message)
    browser.press("Enter")


def chat(browser: Browser, message: str) -> None:
    """Sends and waits for the end of the answer."""
    before = browser.evaluate("document.querySelectorAll('.turn').length")
    send(browser, message)
    browser.until(f"document.querySelectorAll('.turn').length >= {before + 2} && {IDLE}")


def test_an_answer_is_streamed_and_measured(browser: Browser, api: ScriptedApi):
    api.script = [text("Hel"), text("lo, "), text("you")]
    browser.open(api.url)
    chat(browser, "Hi")
    assert browser.text(f"{LAST} .prose") == "Hello, you"
    assert "3 tokens" in browser.text(f"{LAST} .meta")
    assert "first after" in browser.text(f"{LAST} .meta")
    assert api.bodies[0]["model"] == MODEL
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert api.bodies[0]["stream"] is True


def test_the_conversation_is_sent_along_and_kept(browser: Browser, api: ScriptedApi):
    api.script = [text("One.")]
    browser.open(api.url)
    chat(browser, "First")
    chat(browser, "Second")
    roles = [message["role"] for message in api.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    browser.open(api.url)
    assert browser.text("#conversations .open") == "First"
    browser.click("#conversations .open")
    assert browser.evaluate("document.querySelectorAll('.turn').length") == 4


def test_stop_ends_the_request_and_keeps_what_came(browser: Browser, api: ScriptedApi):
    api.script = [text("So far"), "hang"]
    browser.open(api.url)
    send(browser, "Go on")
    browser.until(f"document.querySelector('{LAST} .prose').innerText === 'So far'")
    browser.click("#stop")
    browser.until(IDLE)
    assert api.left.wait(PATIENCE)
    assert "stopped" in browser.text(f"{LAST} .meta")
    assert browser.text(f"{LAST} .error") == ""


def test_escape_stops_too(browser: Browser, api: ScriptedApi):
    api.script = [text("x"), "hang"]
    browser.open(api.url)
    send(browser, "Go on")
    browser.until("!document.querySelector('#stop').hidden")
    browser.press("Escape")
    browser.until(IDLE)
    assert api.left.wait(PATIENCE)


def test_answers_go_on_while_others_are_read(browser: Browser, api: ScriptedApi):
    api.script = [text("First "), "wait", text("answer.")]
    browser.open(api.url)
    send(browser, "One")
    browser.until(f"document.querySelector('{LAST} .prose')?.innerText === 'First'")
    browser.click("#new-chat")
    browser.until("document.querySelectorAll('.turn').length === 0")
    assert browser.evaluate(IDLE)
    api.script = [text("Second "), "hang"]
    send(browser, "Two")
    browser.until(f"document.querySelector('{LAST} .prose')?.innerText === 'Second'")
    assert browser.evaluate("document.querySelectorAll('#conversations .busy').length") == 2
    browser.click("#conversations li:nth-child(2) .open")
    assert browser.text(f"{LAST} .prose") == "First"
    assert not browser.evaluate(IDLE)
    api.go.set()
    browser.until(f"document.querySelector('{LAST} .prose').innerText === 'First answer.'")
    browser.until(IDLE)
    assert not api.left.is_set()
    browser.click("#conversations li:nth-child(2) .open")
    assert browser.text(f"{LAST} .prose") == "Second"
    browser.click("#stop")
    browser.until(IDLE)
    assert api.left.wait(PATIENCE)
    assert "stopped" in browser.text(f"{LAST} .meta")
    assert browser.evaluate("document.querySelectorAll('#conversations .busy').length") == 0


def test_an_answer_that_ends_out_of_sight_is_kept(browser: Browser, api: ScriptedApi):
    api.script = [text("At "), "wait", text("last.")]
    browser.open(api.url)
    send(browser, "One")
    browser.until(f"document.querySelector('{LAST} .prose')?.innerText === 'At'")
    browser.click("#new-chat")
    api.go.set()
    browser.until("!document.querySelector('#conversations .busy')")
    assert browser.evaluate("document.querySelectorAll('.turn').length") == 0
    browser.open(api.url)
    browser.click("#conversations .open")
    assert browser.text(f"{LAST} .prose") == "At last."


@pytest.mark.parametrize("shown", [True, False])
def test_a_conversation_deleted_while_answered_stays_away(browser, api, shown: bool):
    api.script = [text("So far"), "hang"]
    browser.open(api.url)
    browser.evaluate("window.confirm = () => true")
    send(browser, "Go on")
    browser.until(f"document.querySelector('{LAST} .prose')?.innerText === 'So far'")
    if not shown:
        browser.click("#new-chat")
    browser.click("#conversations .remove")
    assert api.left.wait(PATIENCE)
    api.script = [text("ok")]
    chat(browser, "Another")  # what is late has come
    titles = "[...document.querySelectorAll('#conversations .open')].map(o => o.innerText)"
    assert browser.evaluate(titles) == ["Another"]
    kept = "Object.keys(localStorage).filter(key => key.startsWith('quire.chat.')).length"
    assert browser.evaluate(kept) == 1


def test_a_browser_takes_five_answers_at_once(browser: Browser, api: ScriptedApi):
    """With its six connections taken, nothing else would come: no figures, and no word why."""
    api.script = ["wait", text("ok")]
    browser.open(api.url)
    for number in range(5):
        send(browser, f"Number {number}")
        browser.click("#new-chat")
    send(browser, "One too many")
    assert "5 answers" in browser.text("#notice")
    assert browser.evaluate("document.querySelector('#prompt').value") == "One too many"
    api.go.set()
    browser.until("!document.querySelector('#conversations .busy')")
    browser.press("Enter")
    browser.until(f"document.querySelector('{LAST} .prose')?.innerText === 'ok' && {IDLE}")
    assert browser.text("#notice") == ""


def test_reasoning_is_folded(browser: Browser, api: ScriptedApi):
    api.script = [{"reasoning_content": "Let me "}, {"reasoning": "think."}, text("Done.")]
    browser.open(api.url)
    chat(browser, "Think")
    assert browser.evaluate(f"document.querySelector('{LAST} details').open") is False
    assert browser.evaluate(f"document.querySelector('{LAST} .thought').textContent") == (
        "Let me think."
    )
    assert browser.text(f"{LAST} summary").startswith("Thought for")
    assert browser.text(f"{LAST} .prose") == "Done."


def test_tool_calls_are_shown_and_answered(browser: Browser, api: ScriptedApi):
    api.script = [call(0, "", "get_weather"), call(0, '{"city":'), call(0, '"Oslo"}')]
    api.finish = "tool_calls"
    browser.open(api.url)
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    browser.evaluate(
        "{ const f = document.querySelector('[name=tools]');"
        f"f.value = {json.dumps(json.dumps(tools))};"
        "f.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    chat(browser, "Weather?")
    assert api.bodies[0]["tools"] == tools
    assert browser.text(f"{LAST} .call-name") == "get_weather"
    assert json.loads(browser.text(f"{LAST} .call pre")) == {"city": "Oslo"}
    api.script, api.finish = [text("Rain.")], "stop"
    browser.click(f"{LAST} .call textarea")
    browser.type("rain")
    browser.click(f"{LAST} .send-results button")
    browser.until(f"document.querySelector('{LAST} .prose').innerText === 'Rain.' && {IDLE}")
    _, asked, result = api.bodies[1]["messages"]
    assert asked["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"city":"Oslo"}',
    }
    assert result == {"role": "tool", "tool_call_id": "call_0", "content": "rain"}


def test_tokens_held_back_are_not_counted_into_the_speed(browser: Browser, api: ScriptedApi):
    """A call's opening comes at once when its name is known; its end comes with the last chunk."""
    api.script = [20, call(0, "", "get_weather"), 0.2, call(0, "{}"), 0.2, 2]
    api.finish = "tool_calls"
    browser.open(api.url)
    chat(browser, "Weather?")
    tokens, speed, *rest = browser.text(f"{LAST} .meta").split(" · ")
    assert tokens == "24 tokens"
    # 3 tokens in the 0.4 s since the first chunk, more or less.
    assert 1 < float(speed.removesuffix(" tokens/s")) < 9
    assert rest == []  # When the first of the 21 was there cannot be told.


def test_settings_are_sent_only_when_given(browser: Browser, api: ScriptedApi):
    api.script = [text("ok")]
    browser.open(api.url)
    browser.evaluate(
        "for (const [n, v] of [['temperature', '0.5'], ['seed', '7'], ['system', 'Be brief.']]) {"
        "const f = document.querySelector(`#settings [name=${n}]`); f.value = v;"
        "f.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    chat(browser, "Hi")
    body = api.bodies[0]
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not {"top_p", "top_k", "min_p", "max_tokens", "tools"} & set(body)
    browser.open(api.url)
    assert browser.evaluate("document.querySelector('[name=temperature]').value") == "0.5"
    browser.click("#reset")
    assert browser.evaluate("document.querySelector('[name=temperature]').value") == ""


@pytest.mark.parametrize(
    ("name", "value", "label"), [("max_tokens", "0", "Most tokens"), ("top_p", "2", "Top-p")]
)
def test_a_wrong_setting_is_told_by_its_label(browser, api, name: str, value: str, label: str):
    browser.open(api.url)
    browser.evaluate(f"document.querySelector('[name={name}]').value = '{value}'")
    chat(browser, "Hi")
    said = browser.text(f"{LAST} .error")
    assert said.startswith(f"The setting “{label}”: ")
    assert name not in said
    assert api.bodies == []


def test_tools_that_are_no_list_are_told(browser: Browser, api: ScriptedApi):
    browser.open(api.url)
    browser.evaluate("document.querySelector('[name=tools]').value = '{}'")
    chat(browser, "Hi")
    assert browser.text(f"{LAST} .error") == "The setting “Tools” is no JSON list."
    assert api.bodies == []


@pytest.mark.parametrize("switches", [None, ["thinking"], ["enable_thinking", "reasoning_effort"]])
def test_thinking_is_switched(browser: Browser, api: ScriptedApi, switches: list[str] | None):
    api.script, api.switches = [text("ok")], switches
    browser.open(api.url)
    assert browser.evaluate("document.querySelector('#thinking').checkVisibility()")
    chat(browser, "By default")
    for value in ("on", "off", ""):
        browser.evaluate(f"document.querySelector('[name=thinking][value=\"{value}\"]').click()")
        chat(browser, f"Thinking: {value}")
    assert [body.get("enable_thinking") for body in api.bodies] == [None, True, False, None]
    browser.evaluate("document.querySelector('[name=thinking][value=off]').click()")
    browser.open(api.url)
    assert browser.evaluate("document.querySelector('[name=thinking]:checked').value") == "off"
    browser.click("#reset")


def test_a_template_without_the_switch_is_sent_none(browser: Browser, api: ScriptedApi):
    api.script, api.switches = [text("ok")], ["enable_thinking"]
    browser.open(api.url)
    browser.evaluate("document.querySelector('[name=thinking][value=on]').click()")
    api.switches = ["reasoning_effort"]
    browser.open(api.url)
    browser.until("document.querySelector('option')")
    assert not browser.evaluate("document.querySelector('#thinking').checkVisibility()")
    chat(browser, "Hi")
    assert "enable_thinking" not in api.bodies[0]
    browser.evaluate(
        "document.querySelector('[name=seed]').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    api.switches = ["enable_thinking"]
    browser.open(api.url)
    browser.until("document.querySelector('#thinking').checkVisibility()")
    assert browser.evaluate("document.querySelector('[name=thinking]:checked').value") == "on"
    browser.click("#reset")


@pytest.mark.parametrize(
    ("finish", "failure", "said"),
    [
        ("stop", (400, "temperature: too warm."), "temperature: too warm."),
        ("error", None, "The worker died."),
        (None, None, "The connection ended before the answer did."),
    ],
)
def test_failures_are_told_in_the_servers_words(browser, api, finish, failure, said):
    api.script, api.finish, api.failure = [text("x")], finish, failure
    browser.open(api.url)
    chat(browser, "Hi")
    assert browser.text(f"{LAST} .error") == said
    # Chromium itself notes a failed request; nothing else may be said.
    browser.complaints[:] = [c for c in browser.complaints if "400 (Bad Request)" not in c]
    api.finish, api.failure = "stop", None
    browser.evaluate(f"[...document.querySelectorAll('{LAST} .foot button')].at(-1).click()")
    browser.until(f"document.querySelector('{LAST} .prose').innerText === 'x' && {IDLE}")
    assert browser.text(f"{LAST} .error") == ""
    assert api.bodies[0]["messages"] == api.bodies[1]["messages"]


def test_an_edited_message_replaces_what_followed(browser: Browser, api: ScriptedApi):
    api.script = [text("ok")]
    browser.open(api.url)
    chat(browser, "Firts")
    browser.evaluate("document.querySelectorAll('.user .foot button')[1].click()")
    assert browser.evaluate("document.querySelector('#prompt').value") == "Firts"
    browser.evaluate("document.querySelector('#prompt').value = ''")
    send(browser, "First")
    browser.until(f"document.querySelector('.bubble').innerText === 'First' && {IDLE}")
    assert api.bodies[1]["messages"] == [{"role": "user", "content": "First"}]
    assert browser.evaluate("document.querySelectorAll('.turn').length") == 2


def test_a_draft_outlives_an_edit(browser: Browser, api: ScriptedApi):
    api.script = [text("ok")]
    value = "document.querySelector('#prompt').value"
    browser.open(api.url)
    chat(browser, "One")
    chat(browser, "Two")
    browser.type("A draft")
    for index in (3, 1):  # another message may be chosen without leaving the first
        browser.evaluate(f"document.querySelectorAll('.user .foot button')[{index}].click()")
    assert browser.evaluate(value) == "One"
    browser.press("Escape")
    assert browser.evaluate(value) == "A draft"
    browser.evaluate("document.querySelectorAll('.user .foot button')[3].click()")
    browser.type("!")
    browser.press("Enter")
    browser.until(f"document.querySelectorAll('.bubble')[1].innerText === 'Two!' && {IDLE}")
    assert browser.evaluate(value) == "A draft"


def test_trying_again_ends_an_edit(browser: Browser, api: ScriptedApi):
    """The message that was being edited may be gone with it."""
    api.script = [text("ok")]
    browser.open(api.url)
    chat(browser, "One")
    chat(browser, "Two")
    browser.evaluate("document.querySelectorAll('.user .foot button')[3].click()")
    browser.evaluate("document.querySelectorAll('.assistant .foot button')[1].click()")
    browser.until(f"document.querySelectorAll('.turn').length === 2 && {IDLE}")
    assert browser.evaluate("document.querySelector('#prompt').value") == ""
    chat(browser, "Three")
    assert [m["content"] for m in api.bodies[-1]["messages"]] == ["One", "ok", "Three"]


def test_the_page_asks_for_the_key_once(browser: Browser, api: ScriptedApi):
    api.key, api.script = "sk-right", [text("in")]
    browser.call("Page.navigate", url=api.url)
    browser.until("document.querySelector('#key-dialog')?.open")
    assert "does not know" not in browser.text("#key-dialog")
    browser.type("sk-wrong")
    browser.press("Enter")
    browser.until(
        "document.querySelector('#key').value === '' && document.querySelector('dialog').open"
    )
    assert "The server does not know this key." in browser.text("#key-dialog")
    assert not browser.evaluate("document.querySelector('#key').matches(':user-invalid')")
    browser.type("sk-right")
    browser.press("Enter")
    browser.until("document.querySelector('option')")
    chat(browser, "Hi")
    assert browser.text(f"{LAST} .prose") == "in"
    assert "sk-right" not in browser.evaluate("JSON.stringify(localStorage)")
    browser.complaints[:] = [c for c in browser.complaints if "401 (Unauthorized)" not in c]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("key", [None, "sk-right"])
def test_the_command_for_a_shell_works_with_the_servers_keys(browser, api, key: str | None):
    api.key, api.script = key, [text("From a shell")]
    browser.call("Page.navigate", url=api.url)
    if key:
        browser.until("document.querySelector('#key-dialog')?.open")
        browser.type(key)
        browser.press("Enter")
    browser.until("document.querySelector('#curl')?.textContent")
    command = browser.evaluate("document.querySelector('#curl').textContent")
    environment = {**os.environ, "QUIRE_API_KEY": key or "", "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "From a shell" in done.stdout
    assert ("Authorization" in command) == bool(key)
    assert "sk-right" not in command
    browser.complaints[:] = [c for c in browser.complaints if "401 (Unauthorized)" not in c]


def test_the_figures_come_from_the_metrics(browser: Browser, api: ScriptedApi):
    browser.open(api.url)
    browser.until(
        "document.querySelector('.cells dd').innerText && "
        "document.querySelector('.legend span').innerText === '10'"
    )
    cells = browser.evaluate("[...document.querySelectorAll('.cells dd')].map(d => d.innerText)")
    assert cells[1:] == ["7", "2", "25%"]  # running, over both models; waiting; from the cache
    figures = browser.text("#figures")
    assert "free 70" in figures
    assert "weights 2.00 GiB" in figures
    assert "other 512 MiB" in figures
    assert "peak 4.00 GiB" in figures


def test_a_phone_opens_and_closes_the_columns(browser: Browser, api: ScriptedApi):
    browser.screen(390, 844)
    browser.open(api.url)
    width = browser.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    visible = "getComputedStyle(document.querySelector('#panel')).visibility === 'visible'"
    assert not browser.evaluate(visible)
    browser.click("[data-open=panel]")
    browser.until(visible)
    assert browser.evaluate("document.querySelector('#panel').contains(document.activeElement)")
    browser.press("Escape")
    browser.until(f"!({visible})")
    assert browser.evaluate("document.activeElement.dataset.open") == "panel"


def test_keys_alone_are_enough(browser: Browser, api: ScriptedApi):
    api.script = [text("ok")]
    browser.open(api.url)
    chat(browser, "Hi")
    browser.press("n", "KeyN", modifiers=1)
    browser.until("document.querySelectorAll('.turn').length === 0")
    browser.evaluate("document.activeElement.blur()")
    browser.press("/", "Slash")
    assert browser.evaluate("document.activeElement.id") == "prompt"
    assert browser.evaluate("document.activeElement.value") == ""


def test_a_server_that_went_is_noticed(browser: Browser, api: ScriptedApi):
    browser.open(api.url)
    browser.until("document.querySelector('#state').dataset.state === 'ready'")
    browser.call(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    try:
        browser.until("document.querySelector('#state').innerText === 'not reachable'")
        chat(browser, "Hi")
        assert browser.text(f"{LAST} .error") == "The server cannot be reached."
    finally:
        browser.call(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
    browser.complaints[:] = [c for c in browser.complaints if "ERR_INTERNET_DISC" not in c]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_end_of_a_long_answer_stays_in_sight(browser: Browser, api: ScriptedApi, width: int):
    browser.screen(width, 700)
    api.script = [text(f"Line {number}.\n\n") for number in range(60)] + [text("The end.")]
    browser.open(api.url)
    chat(browser, "Count")
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom".format
    composer = browser.evaluate(bottom("#composer"))
    assert composer <= 700
    assert browser.evaluate(bottom(f"{LAST} .prose p:last-child")) < composer


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1280, 900), (1024, 700), (390, 844)])
def test_the_page_itself_never_scrolls(
    browser: Browser, api: ScriptedApi, width: int, height: int
) -> None:
    browser.screen(width, height)
    browser.open(api.url)
    size = "document.scrollingElement.scrollHeight, document.scrollingElement.scrollWidth"
    tall, wide = browser.evaluate(f"[{size}]")
    assert (tall, wide) == (height, width)
