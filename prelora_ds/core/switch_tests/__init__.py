"""Tests that end a phase: pure functions of the windows that have closed since it began, and of the run's progress.

Each test has its own module.
"""

from __future__ import annotations

from collections.abc import Callable

from prelora_ds.core.switch_tests.budget import BudgetTest
from prelora_ds.core.switch_tests.fixed import FixedTest
from prelora_ds.core.switch_tests.prelora import PreloraTest
from prelora_ds.core.switch_tests.protocol import SwitchTest as SwitchTest
from prelora_ds.core.switch_tests.stable_rank import StableRankTest
from prelora_ds.core.switch_tests.t_test import LossTTest

SWITCH_TESTS: dict[str, Callable[..., SwitchTest]] = {
    "prelora": PreloraTest,
    "t_test": LossTTest,
    "fixed": FixedTest,
    "budget": BudgetTest,
    "stable_rank": StableRankTest,
}
