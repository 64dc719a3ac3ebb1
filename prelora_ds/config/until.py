"""`until:` of a phase: the tests that end it, or a duration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict, chosen_by
from prelora_ds.core.switch_tests import SWITCH_TESTS, SwitchTest
from prelora_ds.core.switch_tests.combined import AllOf, AnyOf


class SwitchTestConfig(Strict):
    """A test that ends a phase: its name and its parameters."""

    test: str

    def switch_test(self) -> SwitchTest:
        return SWITCH_TESTS[self.test](**self.model_dump(exclude={"test"}))


class Algorithm1(Strict):
    """The parameters of PreLoRA's Algorithm 1."""

    tau: Annotated[float, Field(gt=0)]
    """The largest change of a weight norm between two successive windows, in per cent."""

    zeta: Annotated[float, Field(gt=0)]
    """The largest change of the mean loss between two successive windows, in per cent."""

    k: Annotated[int, Field(ge=2)] = 3
    """How many of the last windows are compared; all k - 1 changes must be small enough."""

    m: Positive = 3
    """How many observations (`observe.every`) make a window."""

    statistic: Literal["mean", "last"] = "mean"
    """
    The norm of a window: the `mean` of its observations, or the `last` of them. The paper leaves
    this open.
    """

    aggregate: Literal["norm_of_mean", "mean_of_layers"] = "norm_of_mean"
    """
    The change of a family: that of the norm averaged over its layers (`norm_of_mean`, as in the
    paper), or the mean of the absolute changes of its layers (`mean_of_layers`).
    """

    strict: bool = False
    """
    Whether the change of a norm must be smaller than `tau`, as in the authors' code. Otherwise it
    may also be equal to it.
    """

    windows: Literal["disjoint", "sliding"] = "disjoint"
    """
    Whether windows share no observation (`disjoint`), or each observation closes a window of the
    last `m` ones (`sliding`, as in the authors' code).
    """

    joined: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(default_factory=dict)
    """
    Families that the test judges as one, by a name for them: `{output: [o, fc2]}` in the authors'
    code, where this family has two linears per layer. Norms and ranks are still those of each
    family.
    """


class PreloraUntil(Algorithm1, SwitchTestConfig):
    """The end of a phase by Algorithm 1."""

    test: Literal["prelora"]
    """The test: `prelora` is Algorithm 1, which passes when weight norms and loss have settled."""


class TTestUntil(SwitchTestConfig):
    """The end of a phase by a t-test of the loss."""

    test: Literal["t_test"]
    """The test: `t_test` passes when the loss of a window is not significantly below the one before."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """
    The level of significance: a fall of the loss counts if its p-value is at most this. A larger
    value ends the phase later.
    """

    k: Annotated[int, Field(ge=2)] = 2
    """How many of the last windows are compared; in none of the k - 1 comparisons the loss may fall."""

    m: Annotated[int, Field(ge=2)] = 10
    """How many observations (`observe.every`) make a window; the t-test compares their losses."""


class UnmeasuredUntil(SwitchTestConfig):
    """The end of a phase by a test that does not look at windows itself."""

    m: Positive | None = None
    """
    How many observations (`observe.every`) make a window, for ranks that depend on windows; with
    `null` this test closes none.
    """


class FixedUntil(UnmeasuredUntil):
    """The end of a phase at a fixed share of the run."""

    test: Literal["fixed"]
    """The test: `fixed` passes at a share of the run, whatever was measured."""

    at: Annotated[float, Field(gt=0, lt=1)]
    """The share of the run's steps, counted from the start of the run."""


class BudgetUntil(UnmeasuredUntil):
    """The end of a phase when the run has spent a number of FLOPs."""

    test: Literal["budget"]
    """The test: `budget` passes when all steps so far have cost a given number of FLOPs."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """
    The budget as a share of what the whole run would cost if all parameters trained. Either this or
    `flops` must be set.
    """

    flops: Annotated[float, Field(gt=0)] | None = None
    """The budget as a number of FLOPs, of all ranks together; a multiply-add counts as 2."""

    @model_validator(mode="after")
    def _has_one_budget(self) -> BudgetUntil:
        if (self.share is None) == (self.flops is None):
            raise FieldError("share", self.share, "set either share or flops", "set one of them")
        return self


class StableRankUntil(SwitchTestConfig):
    """The end of a phase by the stable ranks of its weights."""

    test: Literal["stable_rank"]
    """
    The test: `stable_rank` passes when the stable ranks of the weights have settled, as in
    Cuttlefish. It needs `observe.spectra`.
    """

    tau: Annotated[float, Field(gt=0)]
    """
    The largest change of a family's mean stable rank between two successive windows, in per cent.
    """

    k: Annotated[int, Field(ge=2)] = 3
    """How many of the last windows are compared; all k - 1 changes must be small enough."""

    m: Positive = 3
    """How many observations (`observe.every`) make a window; its stable ranks are those of the last."""


_BY_NAME, _CHECK_NAME = chosen_by("test", SWITCH_TESTS, "a test", "{test: fixed, at: 0.5}")

# All tests that a recipe can name; CONTRIBUTING.md says how to add one.
AnySwitchTest = Annotated[
    Annotated[PreloraUntil, Tag("prelora")]
    | Annotated[TTestUntil, Tag("t_test")]
    | Annotated[FixedUntil, Tag("fixed")]
    | Annotated[BudgetUntil, Tag("budget")]
    | Annotated[StableRankUntil, Tag("stable_rank")],
    _BY_NAME,
    _CHECK_NAME,
]


def _check_together(key: str, tests: Sequence[SwitchTestConfig]) -> None:
    """Raise FieldError about ``key`` if the ``tests`` cannot end a phase together."""
    if len(tests) < 2:
        raise FieldError(key, [test.test for test in tests], "combines several tests, but there are fewer than two",
                         "write a single test without it")
    made = [(test.test, test.switch_test().windowing) for test in tests]
    shown = [f"{name} has m {windowing.m}, statistic {windowing.statistic} and "
             f"{'sliding' if windowing.sliding else 'disjoint'} windows"
             for name, windowing in made if windowing is not None]
    if len({windowing for _, windowing in made} - {None}) > 1:
        raise FieldError(key, [name for name, _ in made], "contains tests that compare the windows of one phase, but "
                         f"would make them differently: {'; '.join(shown)}",
                         "set the same m; t_test needs statistic: mean and windows: disjoint")


class AnyUntil(Strict):
    """The end of a phase as soon as one of several tests passes."""

    any: tuple[AnySwitchTest, ...]
    """The tests, of which one must pass. Tests that compare windows must make them alike."""

    @model_validator(mode="after")
    def _fit_together(self) -> AnyUntil:
        _check_together("any", self.any)
        return self

    def switch_test(self) -> SwitchTest:
        return AnyOf(tuple(test.switch_test() for test in self.any))


class AllUntil(Strict):
    """The end of a phase when all of several tests pass."""

    all: tuple[AnySwitchTest, ...]
    """
    The tests, all of which must pass at the same observation. Tests that compare windows must make
    them alike.
    """

    @model_validator(mode="after")
    def _fit_together(self) -> AllUntil:
        _check_together("all", self.all)
        return self

    def switch_test(self) -> SwitchTest:
        return AllOf(tuple(test.switch_test() for test in self.all))


UntilConfig = SwitchTestConfig | AnyUntil | AllUntil


def _kind_of_until(value: Any) -> str:
    for key, model in (("any", AnyUntil), ("all", AllUntil)):
        if isinstance(value, model) or (isinstance(value, dict) and key in value):
            return f"as a list of {key}"
    return "as a test" if isinstance(value, dict | SwitchTestConfig) else "as a duration"


Until = Annotated[
    Annotated[DurationField, Tag("as a duration")]
    | Annotated[AnySwitchTest, Tag("as a test")]
    | Annotated[AnyUntil, Tag("as a list of any")]
    | Annotated[AllUntil, Tag("as a list of all")],
    Discriminator(_kind_of_until),
]
