"""The tables of docs/methods.md about kinds of adapters, made from their pure halves.

Only `make docs` and a test import this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from prelora_ds.core.adapters import KINDS, AdapterKind, AdapterSpec
from prelora_ds.core.adapters.refused import REFUSED

BEGIN, END = "<!-- begin: tables of kinds, written by `make docs` -->", "<!-- end: tables of kinds -->"
RANK = 13
OUT1, OUT2, IN1, IN2 = 79, 83, 89, 13 * 7  # whose products stand for the sizes in a shape
OUTPUTS, INPUTS = OUT1 * OUT2, IN1 * IN2
_WORDS = {OUTPUTS: "out", INPUTS: "in", RANK: "rank", OUT1: "out1", OUT2: "out2", IN1: "in1", IN2: "in2",
          1: "1", INPUTS // RANK: "in / rank", RANK * (RANK - 1) // 2: "rank (rank - 1) / 2"}


def with_tables(page: str) -> str:
    """Return ``page``, the text of docs/methods.md, with the tables of today between their two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{_tables()}\n\n{END}{after}"


def _tables() -> str:
    return "\n\n".join([
        _table(("kind", "leaves of a linear, with the role of each", "options, with their defaults"),
               ((f"`{name}`", _leaves(kind), _options(kind)) for name, kind in KINDS.items())),
        _table(("kind", "ZeRO stages", "merge", "ranks", "rank per linear", "other ranks", "ReLoRA", "DynaLoRA",
                "dropout", "kernels", "outputs when attached"),
               ((f"`{name}`", *_abilities(kind)) for name, kind in KINDS.items())),
        _table(("refused kinds", "why: the kind ...", "instead"), _refusals()),
    ])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _leaves(kind: AdapterKind) -> str:
    spec = AdapterSpec("", RANK, 1.0, 0)
    return ", ".join(f"{kind.role(leaf)}: `{leaf}` [{', '.join(_WORDS[size] for size in shape)}]"
                     for leaf, shape in kind.parameters((OUTPUTS, INPUTS), spec).items())


def _options(kind: AdapterKind) -> str:
    texts = []
    for name, default in kind.options.items():
        choices = kind.choices.get(name)
        values = f" ({', '.join(choices)})" if choices else ""
        texts.append(f"`{name}: {default if isinstance(default, str) else json.dumps(default)}`{values}")
    return ", ".join(texts) or "-"


def _abilities(kind: AdapterKind) -> tuple[str, ...]:
    can = kind.can
    yes = {True: "yes", False: "no"}
    stages = sorted(can.zero_stages)
    words = {"exact": "the same bits", "rounding": "change by rounding"}
    return (f"{stages[0]} to {stages[-1]}" if len(stages) > 1 else str(stages[0]), yes[can.merges],
            yes[can.ranked], yes[can.rank_per_module], yes[can.resizes], yes[can.restarts], yes[can.selects],
            yes[can.dropout], ", ".join(can.kernels), words[can.at_attach])


def _refusals() -> list[tuple[str, ...]]:
    names: dict[tuple[str, str], list[str]] = {}
    for name, refused in REFUSED.items():
        names.setdefault((refused.reason, refused.remedy), []).append(f"`{name}`")
    return [(", ".join(found), reason, remedy) for (reason, remedy), found in names.items()]
