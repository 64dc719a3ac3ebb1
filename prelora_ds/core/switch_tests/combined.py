"""Several tests of one phase, of which any one or all must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from prelora_ds.core.switch_tests.prelora import Verdict, Windowing, WindowStats
from prelora_ds.core.switch_tests.progress import Progress
from prelora_ds.core.switch_tests.protocol import SwitchTest


@dataclass(frozen=True)
class _Combined:
    """Tests that share one kind of windows. Raises ValueError if their windows differ."""

    tests: tuple[SwitchTest, ...]

    def __post_init__(self) -> None:
        made = {test.windowing for test in self.tests} - {None}
        if len(made) > 1:
            raise ValueError("the tests of one phase share its windows, but these make different ones")

    @property
    def windowing(self) -> Windowing | None:
        return next((test.windowing for test in self.tests if test.windowing is not None), None)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(test.needs for test in self.tests))

    def _verdicts(self, windows: Sequence[WindowStats], progress: Progress) -> Iterator[tuple[str, Verdict]]:
        """The verdict of each test, and its reason with the name of the test."""
        for test in self.tests:
            missing = test.k - len(windows)
            verdict = test(windows, progress) if missing <= 0 else Verdict(False, f"{missing} windows missing")
            yield f"{test.title}: {verdict.reason}", verdict


@dataclass(frozen=True)
class AnyOf(_Combined):
    """It passes as soon as one of its tests does."""

    @property
    def title(self) -> str:
        return f"one of {len(self.tests)} tests"

    @property
    def k(self) -> int:
        return min(test.k for test in self.tests)

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        found = list(self._verdicts(windows, progress))
        passed = [reason for reason, verdict in found if verdict.passed]
        if passed:
            return Verdict(True, passed[0])
        misses = [verdict.miss for _, verdict in found if verdict.miss is not None]
        miss = min(misses, key=lambda each: each.excess, default=None)
        return Verdict(False, "; ".join(reason for reason, _ in found), miss=miss)


@dataclass(frozen=True)
class AllOf(_Combined):
    """It passes when all of its tests pass at the same observation."""

    @property
    def title(self) -> str:
        return f"all {len(self.tests)} tests"

    @property
    def k(self) -> int:
        return max(test.k for test in self.tests)

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        found = list(self._verdicts(windows, progress))
        failed = [(reason, verdict) for reason, verdict in found if not verdict.passed]
        misses = [verdict.miss for _, verdict in failed if verdict.miss is not None]
        miss = max(misses, key=lambda each: each.excess, default=None)
        return Verdict(not failed, "; ".join(reason for reason, _ in failed or found), miss=miss)


def single_tests(test: SwitchTest) -> tuple[SwitchTest, ...]:
    """The tests that ``test`` combines, or the test itself."""
    return test.tests if isinstance(test, AnyOf | AllOf) else (test,)


def with_single_tests(test: SwitchTest, change: Callable[[SwitchTest], SwitchTest]) -> SwitchTest:
    """``test`` with ``change`` applied to each test that it combines, or to itself."""
    if isinstance(test, AnyOf | AllOf):
        return replace(test, tests=tuple(map(change, test.tests)))
    return change(test)
