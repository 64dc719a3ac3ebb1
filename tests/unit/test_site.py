"""The site of the documentation: it builds strictly, is complete, and opens from a disk without a network."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import sync_playwright
from support.browser import CHROMIUM, QUIET, needs_chromium

import prelora_ds

pytest.importorskip("sphinx", reason="needs the extra docs")
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).parents[2]
# myst-parser 5.2 uses attributes that Sphinx 9 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks/README.md"])


class Html(HTMLParser):
    """ids: the anchors of a page. links: what its `a` elements lead to. loaded: what a browser loads to show it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev"):
            self.loaded.append(values.get("href") or "")
        self.loaded += [value for name in ("src", "srcset", "data") if (value := values.get(name))]


read = cache(Html)


def build(source: Path, out: Path) -> str:
    """Build the site of the pages in ``source`` as `make docs` does, and return the warnings."""
    warnings = StringIO()
    with patch_docutils(ROOT / "docs/site"), docutils_namespace():
        Sphinx(source, ROOT / "docs/site", out, out / ".doctrees", "html", status=None, warning=warnings).build()
    return warnings.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    assert build(ROOT, out) == ""
    return out


def test_every_page_is_in_the_site_and_in_its_navigation(site: Path) -> None:
    linked = read(site / "README.html").links
    for page in PAGES:
        html = page.relative_to(ROOT).with_suffix(".html")
        assert (site / html).is_file(), page
        assert page == ROOT / "README.md" or str(html) in linked, page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = [target for page in site.rglob("*.html") for target in read(page).loaded]
    loaded += [target for sheet in site.rglob("*.css")
               for target in re.findall(r"url\(\s*[\"']?([^)\"']+)|@import\s+[\"']([^\"']+)", sheet.read_text())
               for target in target if target]
    assert any(target.endswith(".css?v=") or ".css" in target for target in loaded)
    assert [target for target in loaded if re.match(r"(?!data:)[a-z]+:|//", target)] == []


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    seen = 0
    for page in site.rglob("*.html"):
        for link in read(page).links:
            if re.match("[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            assert target.is_file() and target.is_relative_to(site), (page, link)
            assert not anchor or anchor in read(target).ids, (page, link)
            seen += 1
    assert seen > 1000


def test_every_public_name_is_described(site: Path) -> None:
    described = {name.removeprefix("prelora_ds.") for name in read(site / "docs/site/api.html").ids
                 if re.fullmatch(r"prelora_ds\.\w+", name)}
    assert described == set(prelora_ds.__all__)


def test_a_broken_link_or_anchor_is_a_warning(tmp_path: Path) -> None:
    """`make docs` fails with a warning."""
    (tmp_path / "README.md").write_text("# Title\n\n[a](docs/none.md) [b](#here) [c](CHANGELOG.md#there)\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    warnings = [line for line in build(tmp_path, tmp_path / "out").splitlines() if "[myst.xref_missing]" in line]
    assert len(warnings) == 3
    for target in ("'docs/none.md'", "'here'", "doc 'CHANGELOG': 'there'"):
        assert sum(target in line for line in warnings) == 1, (target, warnings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_no_syntax_of_a_tool(page: Path) -> None:
    """Directives, roles, targets, comments and substitutions of MyST would be noise on GitHub and in `less`."""
    text = re.sub(r"^```\w*\n.*?^```$|`[^`]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^[`:~]{3,}.*|^%.*|^\(.+\)=$|^\+\+\+|^---$|\{[\w:-]+\}", text, re.MULTILINE) == []


@needs_chromium
def test_it_opens_from_disk_and_finds_words(site: Path) -> None:
    said: list[str] = []
    with sync_playwright() as playwright, \
            playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET)) as browser:
        shown = browser.new_context(offline=True).new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("requestfailed", lambda request: said.append(f"asked for {request.url}"))
        shown.on("request", lambda request: None if request.url.startswith(("file:", "data:"))
                 else said.append(f"asks for {request.url}"))
        shown.goto((site / "index.html").as_uri())
        shown.wait_for_url("**/README.html")
        for page in set(site.rglob("*.html")) - {site / "index.html"}:
            shown.goto(page.as_uri())
            for width in (1280, 390):
                shown.set_viewport_size({"width": width, "height": 900})
                assert shown.evaluate("document.documentElement.scrollWidth") <= width, page

        shown.goto((site / "search.html").as_uri() + "?q=zeta")
        shown.wait_for_selector("#search-results a")
        found = shown.locator("#search-results a").all_inner_texts()
    assert {"Methods", "Glossary"} <= set(found)
    assert said == []
