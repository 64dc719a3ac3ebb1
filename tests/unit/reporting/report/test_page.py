"""The page of a report in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.browser import CHROMIUM, QUIET, needs_chromium
from support.run_logs import Logs, events_of_methods, write_logs

from prelora_ds.reporting.report.drawing import scripts
from prelora_ds.reporting.report.figure import Figure
from prelora_ds.reporting.report.figures import LeftOut, all_figures
from prelora_ds.reporting.report.page import MOST_BYTES, page
from prelora_ds.reporting.report.reading import read_run
from prelora_ds.reporting.report.summary import summary

WIDTHS = (1280, 390)

# Runs in the page: what a reader at this width would stumble over.
PROBLEMS = """() => {
  const found = [], width = document.documentElement.clientWidth;
  const scrolled = document.documentElement.scrollWidth;
  if (scrolled > width) found.push(`the page is ${scrolled} wide`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, style, noscript")) continue;
    const size = parseFloat(getComputedStyle(parent).fontSize);
    if (size < 11) found.push(`${size} px: ${node.textContent.trim().slice(0, 40)}`);
  }
  for (const view of document.querySelectorAll(".view")) {
    const svg = view.querySelector("svg");
    if (!svg) { found.push(`${view.id} is not drawn`); continue; }
    const all = svg.getBoundingClientRect();
    if (all.width > view.clientWidth + 1) found.push(`${view.id} is wider than its place`);
    if (view.clientWidth < 250) found.push(`${view.id} is only ${view.clientWidth} wide`);
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      const cut = Math.max(all.left - box.left, box.right - all.right, all.top - box.top, box.bottom - all.bottom);
      if (text.textContent && cut > 2) found.push(`${view.id} cuts ${text.textContent} by ${cut.toFixed(1)} px`);
    }
  }
  for (const figure of document.querySelectorAll("figure")) {
    const words = figure.querySelector("[role=img]").getAttribute("aria-label") ?? "";
    if (words.length < 40) found.push(`${figure.id}: no words`);
    if (!figure.querySelector("details table tbody tr")) found.push(`${figure.id}: no numbers`);
  }
  return found;
}"""


def html_of(folder: Path, count: int) -> str:
    """The page of ``count`` runs of three phases."""
    logs = Logs(epochs=30)
    runs = [read_run(write_logs(folder / f"vit_large_seed_{n}", logs, f"run.seed={n}",
                                events=() if n else events_of_methods(logs)), f"vit_large_seed_{n}")
            for n in range(count)]
    made = list(all_figures(runs, 2000))
    return page(summary(runs), [figure for figure in made if isinstance(figure, Figure)],
                [figure for figure in made if isinstance(figure, LeftOut)])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of runs -> the page alone, without the files beside it."""
    written = {}
    for count in (1, 3):
        written[count] = tmp_path_factory.mktemp("alone") / "index.html"
        written[count].write_text(html_of(tmp_path_factory.mktemp("runs"), count))
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, width: int, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page without a network, once its figures are drawn, and what the browser said about it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True,
                                  color_scheme="dark" if scheme == "dark" else "light")
    shown = context.new_page()
    said: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("requestfailed", lambda request: said.append(f"asked for {request.url}"))
    shown.on("request", lambda request: None if request.url.startswith(("file:", "data:", "blob:"))
             else said.append(f"asks for {request.url}"))
    shown.goto(path.as_uri())
    shown.wait_for_selector("html[data-drawn]", state="attached")
    return shown, said


def test_the_gate_of_the_library_holds(pages: dict[int, Path]) -> None:
    assert len(scripts().encode()) <= 1_500_000
    for path in pages.values():
        text = path.read_text()
        assert text.count("<figure") >= 12 and len(text.encode()) <= MOST_BYTES


@needs_chromium
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_from_disk_and_is_legible(browser: Browser, pages: dict[int, Path], width: int,
                                                 count: int) -> None:
    shown, said = opened(browser, pages[count], width)
    assert shown.evaluate(PROBLEMS) == []
    assert said == []


@needs_chromium
def test_text_stands_out_in_the_dark_too(browser: Browser, pages: dict[int, Path]) -> None:
    for scheme, darker in (("light", True), ("dark", False)):
        shown, said = opened(browser, pages[1], 1280, scheme)
        ink, paper = shown.evaluate("""() => {
          const light = color => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
          const text = document.querySelector("#weight_norms svg text");
          return [light(getComputedStyle(text).fill), light(getComputedStyle(document.body).backgroundColor)];
        }""")
        assert (ink < paper) == darker and abs(ink - paper) > 0.6
        assert said == []


@needs_chromium
def test_the_pointer_shows_values_and_a_legend_shows_a_curve_apart(browser: Browser, pages: dict[int, Path]) -> None:
    shown, said = opened(browser, pages[1], 1280)
    view = shown.locator("#weight_norms .view svg")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = shown.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert "mean norm" in tooltip.inner_text() and "step" in tooltip.inner_text()

    def faint() -> int:
        return view.locator("path[stroke][opacity='0.08']").count()

    assert faint() == 0
    shown.locator("#weight_norms .view svg").get_by_text("fc1", exact=True).click(force=True)
    shown.wait_for_function("document.querySelectorAll(\"#weight_norms path[opacity='0.08']\").length == 5")
    assert faint() == 5 and said == []


@needs_chromium
def test_the_page_can_be_printed(browser: Browser, pages: dict[int, Path]) -> None:
    shown, said = opened(browser, pages[1], 1280, "dark")
    pdf = shown.pdf(format="A4")
    assert pdf.startswith(b"%PDF-") and len(pdf) > 50_000
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate("getComputedStyle(document.querySelector('#weight_norms svg text')).fill") == "rgb(0, 0, 0)"
    assert said == []
