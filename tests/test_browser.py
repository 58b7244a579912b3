"""The leaderboard page in a real browser, opened from disk: no server, no network."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from test_page import DOCIDS, HOSTILE, PASSAGES, TEXTS, figure, toy_board, write_cell
from test_serving import Server

from harness import store
from harness.prompts import Limits, Prompt, prepare
from harness.report import page, shards
from harness.specs import Registry
from harness.types import Candidate, Query

pytest.importorskip("selenium", reason="selenium is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium or chromedriver is not on the PATH"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--no-first-run", "--window-size=1280,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three rankings on one candidate set and one model on a second, deeper one."""
    root = tmp_path_factory.mktemp("board")
    deeper = {"depth": 50, "first_stage": {"name": "bm25+depth=50", "sha256": "f2"}}
    cells = [
        *toy_board(root / "r"),
        write_cell(root / "r", "small-1b", changed=deeper, show_text=True),
    ]
    page.render(cells, root / "out", texts=TEXTS)
    return root / "out" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service(executable_path=DRIVER), options=options)
    yield driver
    driver.quit()


class Reader:
    """Somebody who reads the page: opens it, clicks, types, looks."""

    def __init__(self, driver: Any, index: Path, shots: Path) -> None:
        self.driver, self.index, self.shots = driver, index, shots

    def open(self, address: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.index.as_uri() + address)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def texts(self, css: str) -> list[str]:
        found = self.driver.find_elements("css selector", css)
        return [element.text for element in found if element.is_displayed()]

    def wait(self, ready: Callable[[], Any]) -> Any:
        """Until the view has arrived; what is looked at may be replaced in between."""
        from selenium.common.exceptions import (
            NoSuchElementException,
            StaleElementReferenceException,
        )
        from selenium.webdriver.support.ui import WebDriverWait

        passing = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.driver, 10, ignored_exceptions=passing).until(lambda _: ready())

    def click(self, css: str, containing: str = "") -> None:
        def found() -> Any:
            elements = self.driver.find_elements("css selector", css)
            return next((element for element in elements if containing in element.text), None)

        self.wait(found).click()

    def shot(self, name: str) -> None:
        self.shots.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def size(self, width: int, height: int = 1000) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def reader(browser: Any, board: Path, tmp_path: Path) -> Iterator[Reader]:
    """A reader whose session must end without a word on the console."""
    shots = os.environ.get("HARNESS_SCREENSHOTS")
    browser.get_log("browser")
    someone = Reader(browser, board, Path(shots) if shots else tmp_path)
    yield someone
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def names(reader: Reader) -> list[str]:
    return [text.split()[0] for text in reader.texts("#models .model")]


def cell_of(reader: Reader, model: str) -> str:
    script = """return JSON.parse(document.getElementById("data").textContent).rows
        .find((row) => row.model.startsWith(arguments[0])).cells[0].id"""
    return str(reader.run(script, model))


def test_the_board_opens_from_disk_with_table_and_plots(reader: Reader) -> None:
    reader.open()
    assert names(reader) == ["steady-7b", "evil", "small-1b"]
    assert reader.texts("#references .model") == ["first-stage"]
    assert len(reader.driver.find_elements("css selector", "#plots svg .point")) == 4
    assert "steady-7b" in "".join(reader.texts("#plot-left svg text"))
    reader.shot("board")


def test_a_click_on_a_heading_sorts_and_says_so(reader: Reader) -> None:
    reader.open()
    reader.click("th[data-sort='model'] button")
    assert names(reader) == ["evil", "small-1b", "steady-7b"]
    assert reader.find("th[data-sort='model']").get_attribute("aria-sort") == "ascending"
    reader.click("th[data-sort='model'] button")
    assert names(reader) == ["steady-7b", "small-1b", "evil"]
    assert len(reader.driver.find_elements("css selector", "[aria-sort]")) == 1


def test_sorting_works_from_the_keyboard(reader: Reader) -> None:
    reader.open()
    reader.find("th[data-sort='model'] button").send_keys("\ue007")
    assert names(reader) == ["evil", "small-1b", "steady-7b"]


def test_filters_narrow_rows_and_columns_and_live_in_the_address(reader: Reader) -> None:
    reader.open()
    reader.find("[name=q]").send_keys("STEADY")
    assert names(reader) == ["steady-7b"]
    assert "q=STEADY" in reader.driver.current_url
    reader.open("#depth=50")
    assert names(reader) == ["small-1b"]
    assert reader.texts("thead .stage") == ["bm25, depth 50"]
    reader.open("#train=out")
    assert names(reader) == []
    assert reader.find("#nothing").is_displayed()
    reader.click("button[type=reset]")
    assert len(names(reader)) == 3


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("#fs=bm25", 3), ("#method=setwise", 3), ("#method=listwise", 0), ("#size=4-10", 3),
        ("#size=40-", 0), ("#train=in", 3), ("#kind=measured", 3), ("#kind=published", 0),
    ],
)  # fmt: skip
def test_every_filter_keeps_what_it_says(reader: Reader, address: str, left: int) -> None:
    reader.open(address)
    assert len(names(reader)) == left
    assert reader.find("#count").text == f"{left} of 3 rows"


def test_addresses_that_name_nothing_break_nothing(reader: Reader) -> None:
    for address in ("#sort=constructor.value", "#view=constructor", "#view=cell&cell=__proto__",
                    "#fs=none", "#plot=length&x=constructor", "#view=compare&a=x&b=y"):  # fmt: skip
        reader.open(address)
        assert reader.texts("h1") == ["Reranking leaderboard"]


def test_from_a_cell_to_a_query_to_a_call(reader: Reader) -> None:
    reader.open()
    reader.click("#models tr:first-child td.score a")
    reader.wait(lambda: "Provenance" in reader.texts("#detail h3"))
    listing = " ".join(reader.texts("#detail dl"))
    for part in ("key of steady-7b", "org/base at main", "a paper", "2026-01-01T00:01:00Z"):
        assert part in listing
    reader.shot("cell")
    reader.click("#detail tbody a", "q1")
    reader.wait(lambda: "Calls" in reader.texts("#detail h3"))
    assert reader.texts("#detail .list tbody tr")[0].split()[:2] == ["1", "d"]
    assert "▲ 1 from 2" in reader.texts("#detail .list tbody tr")[0]
    assert "▼ 1 from 1" in reader.texts("#detail .list tbody tr:not(.under)")[1]
    reader.click("#detail summary", "Call 1")
    reader.wait(lambda: reader.texts("#detail details pre"))
    assert reader.texts("#detail details pre") == ["d1 explains it", "[2]"]
    assert "chosen" in reader.texts("#detail details .list tr")[1]
    reader.shot("query")
    reader.driver.back()
    reader.wait(lambda: "Provenance" in reader.texts("#detail h3"))


def test_the_command_is_copied(reader: Reader) -> None:
    reader.open("#view=cell&cell=" + cell_of_first(reader))
    reader.wait(lambda: reader.texts(".copy button") == ["Copy"])
    reader.run(
        "document.oncopy = () => { window.copied = String(getSelection()) || document.activeElement.value; }"
    )
    reader.run(
        "navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }"
    )
    reader.click(".copy button")
    reader.wait(lambda: reader.texts(".copy button") == ["Copied"])
    assert reader.run("return window.copied") == "harness run -m steady-7b -d toy"


def test_the_command_is_copied_without_the_clipboard_interface(reader: Reader) -> None:
    reader.open("#view=cell&cell=" + cell_of_first(reader))
    reader.wait(lambda: reader.texts(".copy button") == ["Copy"])
    reader.run("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'))")
    reader.run("""document.execCommand = (what) => {
        window.copied = what + ": " + document.activeElement.value; return true; }""")
    reader.click(".copy button")
    reader.wait(lambda: reader.texts(".copy button") == ["Copied"])
    assert reader.run("return window.copied") == "copy: harness run -m steady-7b -d toy"


def cell_of_first(reader: Reader) -> str:
    reader.open()
    return cell_of(reader, "steady-7b")


def test_downloads_are_rebuilt_from_the_data(reader: Reader) -> None:
    reader.open("#view=cell&cell=" + cell_of_first(reader))
    reader.wait(lambda: reader.texts(".row button"))
    reader.run("""window.saved = []; URL.createObjectURL = (blob) => { blob.text().then((t) => saved.push(t)); return "#"; };
        HTMLAnchorElement.prototype.click = function () { saved.push(this.download); };""")
    for label in ("Run", "Per-query", "Trace"):
        reader.click(".row button", label)
    saved = reader.wait(lambda: len(reader.run("return saved")) == 6 and reader.run("return saved"))
    assert "toy-bm25-steady-7b-run.trec" in saved
    run = next(text for text in saved if text.startswith("q1 Q0"))
    assert run.splitlines()[:3] == [
        "q1 Q0 d%202 1 4 rerank-harness", "q1 Q0 d1 2 3 rerank-harness",
        "q1 Q0 d%25203 3 2 rerank-harness",
    ]  # fmt: skip
    assert any(
        t.startswith("qid,nDCG@10,") and "\nq3,0.9,1,1,30,1.5,unparsable=1\n" in t for t in saved
    )
    assert any('"text":"<think>d1 explains it</think> [2]"' in t for t in saved)


def test_two_cells_are_compared_query_by_query(reader: Reader) -> None:
    reader.open()
    reader.click("#compare-form button")
    reader.wait(lambda: reader.texts("#detail figure svg"))
    assert "A is better on 2, equal on 0, worse on 1 of 3 queries" in " ".join(
        reader.texts(".lead")
    )
    reader.click("#detail tbody a", "q1")
    reader.wait(lambda: len(reader.texts("#detail section .list")) == 2)
    left, right = reader.texts("#detail section .list")
    assert [text.splitlines()[0][-1] for text in (left, right)] == ["B", "A"]
    assert "▲ 1 from 3" in left
    assert "▲ 3 from 4" in right
    reader.shot("compare")


def test_hostile_text_is_shown_and_not_run(reader: Reader) -> None:
    reader.open()
    assert f"evil {HOSTILE}".replace("\u2028", "") in reader.run(
        "return document.querySelector('#models').textContent.replaceAll('\\u2028', '')"
    )
    reader.open(f"#view=query&query=q1&cell={cell_of(reader, 'evil')}")
    reader.wait(lambda: reader.texts("#detail summary"))
    reader.click("#detail summary", "Call 1")
    reader.wait(lambda: reader.texts("#detail details pre"))
    shown = reader.run("return document.getElementById('detail').textContent")
    for before in ("why is the sky blue ", "Light scatters. ", ""):
        assert before + HOSTILE in shown
    assert reader.run("return document.querySelectorAll('img, iframe, object').length") == 0


def test_a_missing_data_file_is_named(browser: Any, board: Path, tmp_path: Path) -> None:
    alone = tmp_path / "index.html"
    shutil.copy(board, alone)
    reader = Reader(browser, alone, tmp_path)
    reader.open()
    assert len(names(reader)) == 3
    reader.click("#models tr:first-child td.score a")
    reader.wait(
        lambda: "does not lie beside this page" in " ".join(reader.texts("#detail .notice"))
    )
    browser.get_log("browser")  # the browser itself reports the missing file


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_never_scrolls_sideways(reader: Reader, scheme: str) -> None:
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    reader.size(360)
    reader.open()
    first, other = cell_of(reader, "steady-7b"), cell_of(reader, "evil")
    views = {"board": "", "cell": f"#view=cell&cell={first}",
             "query": f"#view=query&query=q1&cell={other}",
             "compare": f"#view=compare&query=q1&a={first}&b={other}"}  # fmt: skip
    for name, address in views.items():
        reader.open(address)
        reader.wait(lambda: reader.texts("main h2"))
        assert reader.run("return document.documentElement.scrollWidth") <= 360, name
        reader.shot(f"{name}-360-{scheme}")


def test_the_table_stands_without_scripts(browser: Any, board: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(board.as_uri())
        rows = browser.find_elements("css selector", "#models tr")
        assert [row.find_element("css selector", "td.score").text[:4] for row in rows[:2]] == [
            "70.0",
            "43.3",
        ]
        assert not browser.find_element("id", "filters").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_published_rows_are_marked_filtered_and_say_where_they_stand_in_print(
    reader: Reader, tmp_path: Path, scheme: str
) -> None:
    figures = [figure("As-printed", 71.5), figure("As-printed", 72.0, source="another table")]
    out = tmp_path / "out"
    page.render(toy_board(tmp_path / "r"), out, texts=TEXTS, published=figures)
    reader.index = out / "index.html"
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    reader.open()
    assert names(reader) == ["As-printed", "steady-7b", "evil"]
    assert reader.texts(".base.kind") == ["published figures of rank-r1-7b"]
    reader.shot(f"published-{scheme}")
    reader.open("#kind=measured")
    assert names(reader) == ["steady-7b", "evil"]
    reader.open("#kind=published")
    assert names(reader) == ["As-printed"]
    assert reader.texts("#references .model") == []
    reader.click("#models td.score a")
    reader.wait(lambda: reader.texts("#detail tbody tr"))
    assert reader.texts("#detail tbody tr") == ["71.5 Table 1 high", "72 another table high"]
    assert "not measured here" in reader.texts("#detail .lead")[0]


def test_every_wire_format_is_shown_as_it_is_asked(reader: Reader, tmp_path: Path) -> None:
    prompts = {
        name: replace(p, limits=Limits(), most=None) for name, p in Registry().prompts.items()
    }
    shown, out = [*PASSAGES, Candidate("d%203", "[7] says {query} & {text}.")], tmp_path / "out"
    query = Query("q1", "why {docs} so blue?", tuple(shown), "toy")
    cells = {
        name: write_cell(tmp_path / "r", name, show_text=True, changed={"prompt": asdict(prompt)})
        for name, prompt in prompts.items()
    }
    page.render(list(cells.values()), out, texts={"toy": {"q1": query}})
    reader.index = out / "index.html"
    for name, prompt in prompts.items():
        reader.open(f"#view=query&query=q1&cell={shards.cell_name(cells[name])}")
        reader.click("#detail summary", "Call 1")
        reader.click("#detail summary", "The prompt as it was asked")
        reader.wait(lambda: reader.texts("details.asked pre"))
        found = reader.run(
            "return [...document.querySelectorAll('details.asked pre')].map((e) => e.textContent)"
        )
        assert found == asked(prompt, query), name
        if name == "rank-r1":
            reader.shot("prompt")


def asked(prompt: Prompt, query: Query) -> list[str]:
    """What the harness sends: the turns or the text, the prefill and the scored continuation."""
    ready = prepare(
        query, prompt, prompt.limits, family="None", clip=lambda text, tokens: text,
        raw_special_tokens=False, notes=Counter(),
    )  # fmt: skip
    by_id = {c.docid: c for c in ready.candidates}
    request = prompt.render(ready, [by_id[docid] for docid in DOCIDS])
    texts = [turn.content for turn in request.messages]
    return [*texts, *filter(None, (request.text, request.prefill, request.continuation))]


def test_a_served_page_follows_a_run(reader: Reader, tmp_path: Path) -> None:
    write_cell(tmp_path, "first-1b")
    server = Server(tmp_path)
    try:
        rows = [
            {"cell": "toy/bm25/second-1b", "state": "running", "done": 2, "total": 3, "calls": 7},
            {"cell": f"toy/bm25/{HOSTILE}", "state": "planned"},
        ]
        store.write_progress(tmp_path, rows)
        reader.driver.get(f"http://{server.host}:{server.port}/#cost=no")
        reader.wait(lambda: "2 of 3 queries, 7 calls" in "".join(reader.texts("#live tr")))
        assert reader.texts("#live h2") == ["A run is going: 1 running, 1 planned"]
        reader.shot("live")
        write_cell(tmp_path, "second-1b", values=(1, 1, 1))
        store.write_progress(tmp_path, [])
        reader.wait(lambda: names(reader) == ["second-1b", "first-1b"])
        reader.wait(lambda: not reader.texts("#live"))
        assert reader.driver.current_url.endswith("#cost=no")
    finally:
        store.write_progress(tmp_path, [])
        assert server.stop() == (0, "")
    reader.wait(lambda: "the server has ended" in "".join(reader.texts("#live")).lower())
    reader.driver.get_log("browser")  # the browser itself reports that nobody answers
