"""README and docs tell the truth of today: links, commands, options and messages are those of the code."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from prelora_ds.cli import app
from prelora_ds.hosts.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_the_tables_of_results_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for page, _, table in importlib.import_module("readme").tables():
        assert table in page.read_text(), f"{page.name}: run python benchmarks/readme.py"


def test_every_page_of_docs_is_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in readme] == []


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `prelora ...` in a code block or in backticks, up to a comment, a pipe or the next command."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`(prelora [^`]+)`(?!`)", text)]
    for line in lines:
        found = re.search(r"(?:^|\s)prelora (?!: )(.+)", re.split(r"\s#\s|\s\|\s|\s&&", line)[0])
        if found:
            yield found[1].split(" -- ")[0].split()


@cache
def options_of(command: tuple[str, ...]) -> set[str]:
    """The spellings of all options of a command, a group or, with (), of `prelora` itself."""
    found: Any = get_command(app)
    for word in command:
        found = found.commands[word]
    names = found.context_settings.get("help_option_names", []) if not command else ["--help", "-h"]
    return {*names, *(name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_prelora_command_and_option_exists(page: Path) -> None:
    for words in commands(page):
        if words[0].startswith("-"):
            assert words[0] in options_of(()), words
            continue
        command = tuple(words[:2] if words[0] == "shards" and len(words) > 1 else words[:1])
        for option in (word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)):
            assert option in options_of(command), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_training_command_is_understood(page: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in (line for block in blocks for line in block.replace("\\\n", " ").splitlines()):
        line = re.split(r"\s#\s", line)[0]
        if "launch/pretrain.py --recipe" in line:
            words = line.split("launch/pretrain.py", 1)[1].replace("...", "").split()
            args = parse_arguments([word for word in words if word not in ("a.b=c", "[a.b=c")])
            assert "/" not in args.recipe or (ROOT / args.recipe).is_file(), line


@cache
def literals() -> list[str]:
    """Every text of the source, with … for each value that is filled in."""
    texts = []
    for path in sorted([*(ROOT / "prelora_ds").rglob("*.py"), *(ROOT / "launch").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def messages() -> list[str]:
    rows = re.findall(r"^\| (`[^|]+`) \|", TROUBLESHOOTING.read_text(), re.MULTILINE)
    return [message.strip("`") for row in rows for message in row.split("<br>")]


def test_every_message_of_the_troubleshooting_page_is_in_the_source() -> None:
    found = messages()
    assert len(found) > 20
    for message in found:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, text, re.DOTALL) for text in literals()), message


def test_the_glossary_is_in_alphabetical_order() -> None:
    words = re.findall(r"^\| ([^|]+) \| (?!meaning|---)", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    words = [word for word in words if not word.startswith("-")]
    assert len(words) > 40 and words == sorted(words, key=str.lower)
