"""Tests that end a phase: pure functions of the windows that have closed since it began.

Each test has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from prelora_ds.core.switch_tests.prelora import PreloraTest, Verdict, Windowing, WindowStats


class SwitchTest(Protocol):
    """A test with its parameters, as a recipe selects it in `phases.*.until`.

    title: its name in messages.
    k: how many windows it compares.
    windowing: how its windows are made.
    """

    @property
    def title(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def windowing(self) -> Windowing: ...

    def __call__(self, windows: Sequence[WindowStats]) -> Verdict:
        """Decide whether the phase ends. ``windows`` are at least ``k`` windows, oldest first."""
        ...


SWITCH_TESTS: dict[str, Callable[..., SwitchTest]] = {"prelora": PreloraTest}
