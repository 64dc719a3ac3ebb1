"""Tests that end a phase: pure functions of the windows that have closed since it began. One file per test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from prelora_ds.core.switch_tests.prelora import Observation, PreloraTest, Verdict, WindowStats


class SwitchTest(Protocol):
    """A test with its parameters, as a recipe names it in `phases.*.until`.

    title: what messages call it. k: how many windows it compares. m: how many observations make a window.
    """

    @property
    def title(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def m(self) -> int: ...

    def close(self, index: int, observations: Sequence[Observation]) -> WindowStats:
        """The window that ``observations``, oldest first, make."""
        ...

    def __call__(self, windows: Sequence[WindowStats]) -> Verdict:
        """Whether the phase may end; ``windows`` are at least ``k``, oldest first."""
        ...


SWITCH_TESTS: dict[str, Callable[..., SwitchTest]] = {"prelora": PreloraTest}
