"""The page in a real browser: texts that would be scripts, the keyboard, what a screen reader is told, a narrow screen."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import commit, make_manifest, random_sequences

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("playwright", reason="playwright, which drives a browser, is not installed")

import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from knowledge_store import DumpWriter, KnowledgeStore
from knowledge_store.format.sequences import tokens_table
from knowledge_store.page.app import page_app
from knowledge_store.page.browse import host_names

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: Debian's package is `chromium`")

SCRIPT = "<script>document.title='taken'</script>"
IMAGE = "<img src=x onerror=\"document.title='taken'\">"
# What a corpus or a tokenizer may hold: texts that are scripts in HTML, in an attribute, in a link, in SQL or JSON, and
# characters that have no sign or turn the text around them.
ATTACKS = (
    SCRIPT,
    IMAGE,
    "'\"><svg onload=document.title='taken'>",
    "javascript:document.title='taken'",
    "{{constructor.constructor('document.title=1')()}}${document.title}",
    "</textarea></title></style><b>bold</b>",
    "'; DROP TABLE positions; --",
    '"}],"error":"taken"}\n{"error":"taken"}',
    "\u202edlrow\u202c \u2066\u200b\ufeff",
    "\x00\x07\x1b[31m\r\n",
    "&lt;b&gt;&amp;#60;",
)
PHONE = {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump whose tokens, column names and values are ATTACKS."""
    folder = tmp_path_factory.mktemp("browser") / "store"
    columns = {SCRIPT: "string", IMAGE: "string"}
    manifest = make_manifest("small", shards=1, columns=columns)
    writer = DumpWriter.open(folder, manifest, tokens_table(list(ATTACKS), list(ATTACKS)))
    knowledge = random_sequences(0, len(ATTACKS), longest=30)
    knowledge[0] = random_sequences(3, 1, longest=200)[0]
    commit(writer, 0, knowledge, **dict.fromkeys(columns, ATTACKS))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of the page, on a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        app = page_app(KnowledgeStore.open(folder), hosts=host_names(port))
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser.new_context(reduced_motion="reduce")
        browser.close()


@pytest.fixture
def page(context: Any, address: str) -> Iterator[Page]:
    """A page that fails the test where its script does, or asks anybody but its server."""
    page = context.new_page()
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: failures.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: failures.append(dialog.message))
    page.on("request", lambda request: None if request.url.startswith(address) else failures.append(request.url))
    page.set_default_timeout(90_000)  # a machine may be busy
    expect.set_options(timeout=90_000)
    yield page
    page.close()
    assert failures == []


def opened(page: Page, address: str, place: str) -> None:
    page.goto("about:blank")
    page.goto(f"{address}{place}")
    page.wait_for_selector("main[aria-busy='false'] h1")


def clean(page: Page) -> None:
    """Nothing of the store became an element, and no script of it ran."""
    assert "taken" not in page.title()
    assert page.locator("main script, main svg[onload], main img, main b:text-is('bold'), a[href^='javascript']").count() == 0


ID = 0


@pytest.mark.parametrize(
    "place",
    [
        "#/",
        "#/dump/small",
        "#/sequences/small",
        f"#/sequence/small/{ID}?at=3",
        f"#/sql?q={SCRIPT}",
        f"#/sequence/{IMAGE}/1",
        f"#/{SCRIPT}",
        "#/ask/%E0%A4%A",
    ],
)
def test_texts_stay_texts(page, address, place):
    opened(page, address, place)
    if "at=3" in place:
        page.wait_for_selector("aside dl")
    clean(page)


def test_answers_are_texts_and_lead_to_sequences(page, address, folder):
    opened(page, address, "#/sql")
    table = KnowledgeStore.open(folder).sequences("small")
    names = [name for name in table.column_names if "<" in name]
    quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
    page.fill("#sql", f"SELECT dump, sequence_id, {quoted}, 'x' AS \"<i>'\" FROM sequences ORDER BY sequence_id")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("table")
    clean(page)
    assert page.locator("tbody tr").count() == len(ATTACKS)
    cells = " ".join(page.locator("td.words").all_inner_texts())
    assert SCRIPT in cells and "⟨202E⟩dlrow⟨202C⟩" in cells and "␀␇␛" in cells
    assert page.locator("th", has_text=SCRIPT).count() == 1
    page.get_by_role("link", name="Read the sequence of row 2", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Sequence {1 << 16}")
    clean(page)
    page.go_back()  # the answer is there again, and nothing runs
    expect(page.locator("tbody tr")).to_have_count(len(ATTACKS))


def test_tokens_by_keyboard(page, address):
    opened(page, address, f"#/sequence/small/{ID}")
    tokens = page.get_by_role("listbox")
    options = tokens.get_by_role("option")
    count = options.count()
    assert count > 10
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    for _ in range(30):
        if tokens.evaluate("element => element === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[aria-selected=true]")).to_have_id("token-1")
    expect(tokens).to_have_attribute("aria-activedescendant", "token-1")
    assert re.search(r"position 1, Surprise [\d.]+ nats", options.nth(1).get_attribute("aria-label") or "")
    page.wait_for_selector("aside li.marked")
    assert page.url.endswith(f"#/sequence/small/{ID}?at=1")
    page.keyboard.press("End")
    expect(page.locator("[aria-selected=true]")).to_have_id(f"token-{count - 1}")
    expect(page.get_by_role("status")).to_contain_text("Probability")
    page.keyboard.press("Escape")
    expect(page.locator("[aria-selected=true]")).to_have_count(0)
    page.get_by_text("Tail", exact=True).first.click()
    assert page.url.endswith("?by=tail")


def test_everything_has_a_name(page, address):
    for place in (
        "#/",
        "#/dump/small",
        f"#/sequence/small/{ID}?at=2",
        "#/ask/garbled",
        "#/search",
        "#/sql",
        "#/sequences/small",
    ):
        opened(page, address, place)
        unnamed = page.locator(
            "button, a, input, select, textarea, [role=listbox], [role=img], progress, dialog, nav"
        ).evaluate_all(
            """elements => elements.filter((element) => !(element.getAttribute("aria-label") || element.labels?.length
                || element.innerText?.trim() || element.getAttribute("aria-labelledby"))).map((element) => element.outerHTML)"""
        )
        assert unnamed == []
        assert "[object" not in page.locator("body").inner_text()
        assert page.locator("h1").count() == 1


def test_how_it_was_counted_opens_in_the_sql_box(page, address):
    opened(page, address, "#/")
    page.get_by_role("button", name="How was this counted? The facts of all dumps").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("SELECT * FROM dumps")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="How was this counted? The facts of all dumps").click()
    page.get_by_role("link", name="Open in the SQL box").click()
    expect(page.locator("#sql")).to_have_value("SELECT * FROM dumps ORDER BY dump")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("table")).to_contain_text("numbers")


def test_a_list_that_ends_at_its_limit_says_so(page, address):
    opened(page, address, "#/sql")
    for asked, said in (("SELECT 1 LIMIT 1", "1 row, as many as the statement asks for"), ("SELECT 1 LIMIT 2", "1 row")):
        page.fill("#sql", asked)
        page.get_by_role("button", name="Run").click()
        expect(page.locator("figcaption")).to_have_text(re.compile(f"{said}$"))


def test_a_statement_is_stopped(page, address):
    opened(page, address, "#/sql")
    page.fill(
        "#sql", "SELECT count(*) FROM range(1000000000) AS one, range(1000000) AS other WHERE one.range % 7 = other.range"
    )
    page.get_by_role("button", name="Run").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".outcome")).to_have_text("Stopped.")


def test_a_question_of_an_address_waits_and_one_of_a_link_runs(page, address):
    opened(page, address, "#/ask/unsure?dump=small")
    assert page.locator("table, progress").count() == 0
    page.goto(f"{address}#/")
    page.get_by_role("link", name="Where is the teacher unsure?").click()
    page.wait_for_selector("tbody tr")
    page.get_by_role("link", name="Read the sequence of row 1", exact=True).click()
    page.wait_for_selector("aside dl")
    assert re.search(r"#/sequence/small/\d+\?at=\d+$", page.url)


def test_back_goes_to_where_a_list_was_left(page, address):
    page.set_viewport_size(PHONE)
    opened(page, address, "#/ask/unsure")
    page.get_by_role("button", name="Ask").click()
    page.locator("tbody tr:nth-child(40) a").scroll_into_view_if_needed()
    page.locator("tbody tr:nth-child(40) a").click()
    page.wait_for_selector("aside dl")
    page.go_back()
    page.wait_for_selector("tbody tr")
    page.wait_for_function("() => scrollY > 400")


def test_an_answer_goes_when_something_else_is_asked(page, address):
    opened(page, address, "#/search?in=value")
    page.get_by_label("Text").fill("script")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("tbody tr")
    page.get_by_label("Column", exact=True).select_option(IMAGE)
    assert page.locator("tbody tr").count() == 0 and page.evaluate("() => document.activeElement.id") == "ask-column"


def test_a_place_behind_the_end_of_a_sequence_says_so(page, address):
    opened(page, address, f"#/sequence/small/{ID}?at=5000")
    assert "no token 5,000" in page.inner_text("main")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_on_a_phone(page, address, scheme):
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    for place in ("#/", "#/dump/small", "#/sequences/small", f"#/sequence/small/{ID}?at=2", "#/sql"):
        opened(page, address, place)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= PHONE["width"]
        ink, paper = (page.evaluate(f"() => getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        one, other = (_luminance(color) for color in (ink, paper))
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 7 and (one > other) == (scheme == "dark")


def _luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 has it."""
    values = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
