"""The quantization page in a real browser at a real server: looked at, driven, and asked what it loaded.

Debian's Chromium by playwright. Every request that the page makes, every word in its console, and every
breach of its Content-Security-Policy is collected, and none may be amiss at the end.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server_fixtures import (
    OBJECT,
    QUANTIZED,
    QUICK,
    WORK_SECONDS,
    Server,
    checkpoint,
    first_run,
    new_server,
    wait,
)
from tests.test_server_login import ADMIN, USER, Realm, token

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
]
LONG = "50000"  # iterations, far from done when the test is
# DFQSAM_PICTURES=docs/pictures has the documentation's picture taken anew, of a model made by the server's
# own defaults, which takes minutes.
PICTURES = os.environ.get("DFQSAM_PICTURES")
CONF: dict[str, Any] = {} if PICTURES else QUICK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason="there is no /usr/bin/chromium"),
]


@dataclass
class Watched:
    """A page, and what it did beside what it shows."""

    page: Any
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        """What is read there, with plain spaces."""
        return str(self.page.locator(selector).inner_text()).replace("\u00a0", " ")

    def expect(self, selector: str, text: str | re.Pattern[str]) -> None:
        """Waits until the element's text contains, or matches, another."""
        playwright.expect(self.page.locator(selector)).to_contain_text(text, timeout=1000 * WORK_SECONDS)

    def step(self) -> int:
        """How many steps of synthesis are done; 0 in any other stage."""
        found = re.search(r"Synthesis, (\d+) of", self.text("#step"))
        return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


def watch(browser: Any, **options: Any) -> Watched:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', e => console.error(`CSP: ${e.violatedDirective}`))"
    )
    watched = Watched(context.new_page())
    watched.page.on("request", lambda request: watched.hosts.add(urlsplit(request.url).netloc))
    watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    watched.page.on(
        "console", lambda m: watched.complaints.append(m.text) if m.type in ("error", "warning") else None
    )
    return watched


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has quantized itself, and has answered some clicks."""
    folder = tmp_path_factory.mktemp("page")
    server = new_server(folder)
    try:
        server.start({**CONF, "checkpoint": checkpoint(folder)})
        first_run(server)
        for k in (OBJECT[2], OBJECT[2] - 2):
            for _ in range(3):
                server.session.infer("phantom0", [(*OBJECT[:2], k)])
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def watched(browser: Any, server: Server) -> Iterator[Watched]:
    """The page, opened once for all tests, which go on where the one before them ended."""
    watched = watch(browser)
    watched.page.goto(f"{server.url}/dfqsam/")
    watched.page.wait_for_selector("#board:not([hidden])")
    yield watched
    assert watched.complaints == []
    assert watched.hosts <= {urlsplit(server.url).netloc, ""}  # data: pictures have no host


def serving_key(server: Server) -> str:
    return str(server.session.info()["models"]["dfqsam"]["serving"]["key"])


def rows(watched: Watched, table: str) -> int:
    return int(watched.page.locator(f"#{table} tr").count())


def test_the_page_shows_the_model_its_speed_and_its_pictures(watched: Watched) -> None:
    assert watched.text("#model") in QUANTIZED
    assert 0 <= float(watched.text("#fidelity")) <= 1
    assert re.fullmatch(r"\d\.\d+\sMB", watched.text("#size"))
    for kind in ("embed", "click"):
        assert re.fullmatch(r"[\d.]+\s(ms|s)", watched.text(f"#{kind}"))
    watched.page.wait_for_selector("#images img")
    assert watched.page.evaluate(
        "[...document.querySelectorAll('#shown img')].every(i => i.complete && i.naturalWidth > 0)"
    )
    assert rows(watched, "models") == rows(watched, "history") == 1
    # Local time: what the browser itself makes of the date in the server's answer.
    shown, expected = watched.page.evaluate(
        """() => { const time = document.querySelector('#history time'); return [time.textContent,
        new Date(time.dateTime).toLocaleString([], {dateStyle: 'medium', timeStyle: 'short'})]; }"""
    )
    assert shown == expected


def test_a_narrow_window_needs_no_scrolling_sideways(watched: Watched) -> None:
    watched.page.set_viewport_size({"width": 400, "height": 800})
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 400
    watched.page.set_viewport_size({"width": 1200, "height": 900})


def test_every_control_has_a_name(watched: Watched) -> None:
    """By the browser's own accessibility tree, and reachable by the keyboard."""
    for control in watched.page.locator("button:visible, input:visible, select:visible, a:visible").all():
        playwright.expect(control).to_have_accessible_name(re.compile(r"\S"))
        control.focus()
        assert control.evaluate("e => e === document.activeElement")


def test_a_wrong_option_is_answered_with_a_sentence(watched: Watched, server: Server) -> None:
    watched.page.fill("#option-iterations", "100001")
    watched.page.click("#start")
    watched.expect("#outcome", "Iterations must be 1 to 100000, not 100001.")
    assert not server.session.is_training()
    watched.complaints.clear()  # Chromium itself notes every 4xx in the console


def test_a_quantization_is_started_watched_and_takes_over(watched: Watched, server: Server) -> None:
    first = serving_key(server)
    watched.page.fill("#option-iterations", "2")
    watched.page.fill("#option-seed", "1")
    watched.page.press("#option-seed", "Enter")
    watched.expect("#work-title", "Quantizing")
    playwright.expect(watched.page.locator("#start-form")).to_be_hidden()
    watched.expect("#asked", "seed 1")
    watched.expect("#outcome", "The new model answers, after")
    watched.expect("#model-words", "seed 1")
    wait(lambda: serving_key(server) != first, WORK_SECONDS)
    assert rows(watched, "models") == rows(watched, "history") == 2
    assert "seed 1" in watched.text("#history tr:first-child")
    assert "published" in watched.text("#history tr:first-child")
    watched.expect("#models tr:has-text('seed 1')", "answers now")


def test_an_earlier_model_is_chosen_back(watched: Watched, server: Server) -> None:
    second = serving_key(server)
    button = watched.page.locator("#models button")
    first = button.get_attribute("data-key")
    button.click()
    watched.expect("#choice", "W4A4, seed 0, answers from now on.")
    assert serving_key(server) == first != second
    watched.expect("#model-words", "seed 0")
    watched.expect("#models tr:has-text('seed 0')", "answers now")
    assert watched.page.locator("#models button").get_attribute("data-key") == second
    assert server.session.infer("phantom0", [OBJECT]).params["model"] in QUANTIZED


def test_a_long_quantization_moves_and_is_stopped(watched: Watched, server: Server) -> None:
    key = serving_key(server)
    watched.page.fill("#option-iterations", LONG)
    watched.page.fill("#option-seed", "2")
    watched.page.click("#start")
    wait(lambda: watched.step() > 0, WORK_SECONDS)
    seen = watched.step()
    bar = watched.page.locator("#step-bar")
    assert bar.evaluate("e => [e.value, e.max]") == [seen, int(LONG)]
    wait(lambda: watched.step() > seen, WORK_SECONDS)
    watched.expect("#history tr:first-child", "running")
    assert watched.text("#stages").split() == [
        "Synthesis", "Fidelity", "Calibration", "Compensation", "Writing",
    ]  # fmt: skip
    assert re.fullmatch(rf"(synthesis \d+/{LONG}, \d+ s\n?)+", watched.text("#lines"))
    if PICTURES:
        watched.page.screenshot(path=str(Path(PICTURES) / "quantization-page.png"), full_page=True)
    watched.page.click("#stop")
    watched.expect("#outcome", "It was stopped, after")
    wait(lambda: not server.session.is_training(), WORK_SECONDS)
    assert "stopped" in watched.text("#history tr:first-child")
    assert rows(watched, "history") == 3
    assert rows(watched, "models") == 2
    assert serving_key(server) == key


def test_the_full_report_opens_beside_it(watched: Watched) -> None:
    with watched.page.expect_popup() as opened:
        watched.page.click("#report")
    report = opened.value
    playwright.expect(report.locator("h1")).to_contain_text("W4A4")
    assert report.evaluate("document.querySelector('.image img').naturalWidth") == 256
    report.close()


def test_a_server_that_goes_is_told_and_the_choice_holds_when_it_is_back(
    watched: Watched, server: Server, tmp_path: Path
) -> None:
    key = serving_key(server)
    server.stop()
    watched.expect("#connection", "The server does not answer.")
    server.start({**CONF, "checkpoint": checkpoint(tmp_path)})
    playwright.expect(watched.page.locator("#connection")).to_be_hidden(timeout=1000 * WORK_SECONDS)
    wait(lambda: server.serving().startswith("W4A4"), WORK_SECONDS)
    assert serving_key(server) == key
    watched.expect("#model-words", "seed 0")
    watched.complaints.clear()  # of the connection


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a login, in full precision."""
    realm = HTTPServer(("127.0.0.1", 0), Realm)
    threading.Thread(target=realm.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("closed")
    server = new_server(folder)
    environment = {
        "MONAI_LABEL_AUTH_ENABLE": "true",
        "MONAI_LABEL_AUTH_REALM_URI": f"http://127.0.0.1:{realm.server_port}",
    }
    try:
        server.start({"quantize": "false", "checkpoint": checkpoint(folder)}, environment, path="/auth/")
        yield server
    finally:
        server.stop()
        realm.shutdown()


def test_with_a_login_the_page_asks_for_a_token_and_keeps_it_nowhere(browser: Any, closed: Server) -> None:
    watched = watch(browser)
    page = watched.page
    page.goto(f"{closed.url}/dfqsam/")
    page.wait_for_selector("#login:not([hidden])")
    for given, told in (("nonsense", "not valid"), (token("somebody"), "Role")):
        page.fill("#token", given)
        page.press("#token", "Enter")
        watched.expect("#login .message", told)
        assert page.locator("#board").is_hidden()
    page.fill("#token", token(USER))
    page.press("#token", "Enter")
    watched.expect("#model", "Full precision")
    watched.expect("#no-models", "None yet")
    page.click("#start")
    watched.expect("#outcome", f'Role "{ADMIN}" is required')
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    page.reload()
    page.wait_for_selector("#login:not([hidden])")
    page.fill("#token", token(ADMIN))
    page.press("#token", "Enter")
    watched.expect("#model", "Full precision")
    page.fill("#option-iterations", "100001")
    page.click("#start")
    watched.expect("#outcome", "Iterations must be")
    assert watched.hosts == {urlsplit(closed.url).netloc}
    assert not [text for text in watched.complaints if "CSP" in text]
    page.context.close()
