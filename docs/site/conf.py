"""The site of the documentation (`make docs`). The pages are plain Markdown; what only Sphinx needs is in this folder.

The source folder is the root of the repository, so that a link has the same meaning on GitHub and in the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

from prelora_ds.version import __version__

ROOT = Path(__file__).parents[2]
PAGES = {
    "Use": ["docs/quickstart", "docs/methods", "docs/config", "docs/data", "docs/hpc", "docs/first-gpu",
            "docs/checkpoints", "docs/reports", "docs/trackers", "docs/export", "docs/troubleshooting",
            "docs/glossary"],
    "Program": ["docs/library", "docs/site/api"],
    "Results": ["docs/results", "docs/papers", "benchmarks/README"],
    "Develop": ["docs/architecture", "CONTRIBUTING", "CHANGELOG"],
}

project = "prelora_ds"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/*.md", "docs/site/api.rst"]
exclude_patterns = sorted({path.name for path in ROOT.iterdir() if path.is_dir()} - {"benchmarks", "docs"})
show_warning_types = True
highlight_language = "none"
smartquotes = False  # quotes and dashes stay as they are written, as in "" or --json

# The anchors that GitHub makes from headings.
myst_heading_anchors = 6

# In a docstring `x` is a name of the code, which becomes a link if the reference describes it.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# The site opens from a disk without a network: excerpts in the results of a search would have to be fetched.
html_theme = "furo"
html_title = f"prelora_ds {__version__}"
html_static_path = ["static"]
html_css_files = ["narrow.css"]
html_extra_path = ["index.html"]
html_show_search_summary = False
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

# A field of a docstring: its names, and what they mean, also on further lines that are indented.
_FIELD = re.compile(r"(\w+(?:, \w+)*): (.+)")


def with_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the list of all pages to the first one."""
    if docname == root_doc:
        trees = ("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])
                 for caption, pages in PAGES.items())
        source[0] = "\n\n".join([source[0], *trees])


def without_links_to_folders(app: Sphinx, document: nodes.document) -> None:
    """Show a link to a folder of the repository as text: the site has no page for it."""
    for link in list(document.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (ROOT / link["refdoc"]).parent.joinpath(link["reftarget"]).is_dir():
            link.replace_self(link.children)


def with_defaults_that_parse(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None,
                             returns: str | None) -> tuple[str | None, str | None]:
    """Write ``...`` for a default that a dataclass makes: Sphinx cannot parse ``<factory>``."""
    return signature and signature.replace("<factory>", "..."), returns


def as_restructured_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let the fields of a docstring be a list, and its other text be just text."""
    paragraphs = [list(group) for blank, group in groupby(lines, key=lambda line: not line.strip()) if not blank]
    lines[:] = [line for paragraph in paragraphs for line in [*_converted(paragraph), ""]]


def _converted(paragraph: list[str]) -> Iterator[str]:
    is_list = all(_FIELD.match(line) or line.startswith(" ") for line in paragraph)
    for line in paragraph:
        field = _FIELD.match(line) if is_list else None
        if field:
            yield from (f"``{field[1]}``", f"    {_escaped(field[2])}")
        else:
            yield _escaped(line)


def _escaped(line: str) -> str:
    """The line without markup, except for code in backticks."""
    parts = re.split(r"(``.+?``|`.+?`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", part) for part in parts)


def setup(app: Sphinx) -> None:
    app.connect("source-read", with_pages)
    app.connect("doctree-read", without_links_to_folders)
    app.connect("autodoc-process-signature", with_defaults_that_parse)
    app.connect("autodoc-process-docstring", as_restructured_text)
