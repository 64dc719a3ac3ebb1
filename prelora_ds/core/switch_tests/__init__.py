"""Tests that end a phase: pure functions of the windows that have closed since it began.

Each test has its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from prelora_ds.core.switch_tests.prelora import Observation, PreloraTest, Verdict, WindowStats


class SwitchTest(Protocol):
    """A test with its parameters, as a recipe selects it in `phases.*.until`.

    title: its name in messages.
    k: how many windows it compares.
    m: how many observations make a window.
    """

    @property
    def title(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def m(self) -> int: ...

    def close(self, index: int, observations: Sequence[Observation]) -> WindowStats:
        """Reduce ``observations``, oldest first, to a window."""
        ...

    def __call__(self, windows: Sequence[WindowStats]) -> Verdict:
        """Decide whether the phase ends. ``windows`` are at least ``k`` windows, oldest first."""
        ...


SWITCH_TESTS: dict[str, Callable[..., SwitchTest]] = {"prelora": PreloraTest}
