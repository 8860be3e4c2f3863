"""A browser for the tests of the page; without Chromium they are skipped by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, find_chromium
from scripted_page_server import ScriptedApi, scripted_page


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The shared browser at a desktop's size; no test leaves a complaint behind."""
    chromium.complaints.clear()
    chromium.requested.clear()
    chromium.screen(1280, 800)
    yield chromium
    assert chromium.complaints == []
    chromium.call("Page.navigate", url="about:blank")


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    with scripted_page() as api:
        yield api
