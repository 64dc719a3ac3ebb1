"""What every test that ends a phase has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prelora_ds.core.switch_tests.prelora import Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress


class SwitchTest(Protocol):
    """A test with its parameters, as a recipe selects it in `phases.*.until`.

    title: its name in messages.
    k: how many windows must have closed before it is made. A test with 0 is made at every observation, any other one
        when a window closes.
    windowing: how its windows are made; None if it looks at none.
    needs: what it depends on: ``norms``, ``loss``, another measurement of an `Observation`, or ``flops``.
    """

    @property
    def title(self) -> str: ...

    @property
    def k(self) -> int: ...

    @property
    def windowing(self) -> Windowing | None: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        """Decide whether the phase ends. ``windows`` are at least ``k`` windows of the phase, oldest first."""
        ...
