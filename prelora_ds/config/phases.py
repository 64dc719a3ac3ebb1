"""`phases:` of a recipe: either a list of phases, or a preset with settings for single phases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from prelora_ds.config.adapters import KEPT_MAY_CHANGE, LASTING, AdaptersConfig
from prelora_ds.config.changes import RENAMED
from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict, check_name
from prelora_ds.config.merging import MergeConfig
from prelora_ds.config.selecting import ActiveConfig
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.plan import ADAPTERS, BASE, without_defaults
from prelora_ds.core.switch_tests import SWITCH_TESTS, SwitchTest
from prelora_ds.core.switch_tests.combined import AllOf, AnyOf
from prelora_ds.core.trainable import SETS


class PhaseSettings(Strict):
    """How a phase is run; these settings may differ between two jobs of one run.

    `prelora_ds.run.autosize` resolves ``auto`` at the start of a run.
    """

    micro_batch_size: Positive | Literal["auto"] | None = None
    """
    The number of images per rank and forward pass in this phase; `null` takes
    `train.micro_batch_size`, and `auto` the largest that fits into the memory of a rank.
    """

    zero_stage: Literal[0, 1, 2, 3, "auto"] | None = None
    """
    The ZeRO stage of this phase; `null` takes that of the phase's DeepSpeed config, and `auto` the
    one with the lowest predicted step time among those that fit.
    """

    deepspeed: dict[str, Any] | None = None
    """
    A DeepSpeed config for this phase, which replaces the whole section `deepspeed`; `null` takes
    that section.
    """

    @property
    def is_auto(self) -> bool:
        return "auto" in (self.micro_batch_size, self.zero_stage)


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


def _names_a_test(value: Any) -> Any:
    if isinstance(value, SwitchTestConfig):
        return value
    if not isinstance(value, dict):
        raise FieldError("", value, "is not a test", "write it as a mapping, for example {test: fixed, at: 0.5}")
    check_name(value, "test", SWITCH_TESTS, "a test")
    return value


def name_in(value: Any) -> Any:
    """The name of the test that a mapping of a recipe, or the section that it has become, selects."""
    return value["test"] if isinstance(value, dict) else value.test


# All tests that a recipe can name; CONTRIBUTING.md says how to add one.
AnySwitchTest = Annotated[
    Annotated[PreloraUntil, Tag("prelora")]
    | Annotated[TTestUntil, Tag("t_test")]
    | Annotated[FixedUntil, Tag("fixed")]
    | Annotated[BudgetUntil, Tag("budget")]
    | Annotated[StableRankUntil, Tag("stable_rank")],
    Discriminator(name_in),
    BeforeValidator(_names_a_test),
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


def _kind_of_scale(value: Any) -> str:
    return "as a mapping" if isinstance(value, dict) else "as a number"


Factor = Annotated[float, Field(gt=0)]
LrScale = Annotated[Annotated[Factor, Tag("as a number")] | Annotated[dict[str, Factor], Tag("as a mapping")],
                    Discriminator(_kind_of_scale)]


class PhaseConfig(PhaseSettings):
    """A phase of the method."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """The name of the phase in logs and overrides: a letter, then letters, digits, _ or -."""

    adapters: AdaptersConfig | Literal["none"] | None = None
    """
    The adapters of this phase; `null` keeps those of the phase before, and `none` states that there
    are none.
    """

    train: str | tuple[str, ...] = "all"
    """
    What trains: `all`, or a list of `adapters`, `head`, `norms`, `biases`, `embeddings`, `rest`
    (everything that is not an adapted linear) and regular expressions that match whole names of
    parameters.
    """

    until: Until | None = None
    """
    When the phase ends: after a duration, when a test passes, or when one (`any`) or all (`all`) of
    several tests pass; [methods.md](methods.md) explains the tests. A test uses only windows that
    began in its own phase. The last phase must not have this key, because it lasts until the end of
    the run; all others need it. The phase ends at an observation: after a duration of 0 steps, that
    is the first one (`observe.every`).
    """

    lr_scale: LrScale = 1.0
    """
    A factor of the learning rate, or a mapping with one factor per role: `base` (the model's own
    parameters), `adapters`, or a role of the kind of adapter (`a` and `b` for the two matrices of
    `lora`).
    """

    rewarm: DurationField | None = None
    """
    How long the learning rate rises linearly to its schedule when the phase begins; `null` for no
    such rise. If the phase ends earlier, the rise ends with it, and the next phase begins at its
    own rate.
    """

    moments: Literal["keep", "reset"] = "keep"
    """
    What becomes of the Adam moments and steps of the parameters that go on training when the phase
    begins: `keep` carries them over; with `reset` they begin at zero, as in a new job with a new
    optimizer.
    """

    freeze_below: Annotated[int, Field(ge=1)] | None = None
    """
    The number of a layer (block): everything that the model defines before it is frozen, so that
    the backward pass ends there. `null` freezes nothing.
    """

    merge: MergeConfig | None = None
    """
    How often the adapters are merged into the frozen weights and begin again (ReLoRA); `null` never
    merges them.
    """

    active: ActiveConfig | None = None
    """
    Which of the adapters train at a time (DynaLoRA); `null` trains all of them. It cannot be combined
    with `model.compile`.
    """

    @field_validator("train", mode="before")
    @classmethod
    def _is_text_or_texts(cls, value: Any) -> Any:
        entries = value if isinstance(value, list | tuple) else [value]
        for entry in entries:
            if not isinstance(entry, str):
                raise FieldError(
                    "",
                    value,
                    f"contains {entry!r}, which is not a text",
                    f"write all, or a list of {', '.join(SETS)} and regular expressions",
                )
        return value

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, name: str) -> str:
        if (former := f"phases.{name}") in RENAMED:
            raise FieldError(
                "",
                name,
                f"cannot be the name of a phase: {former} is the former name of {RENAMED[former]}",
                "choose another name",
            )
        return name

    @model_validator(mode="after")
    def _words_are_known(self) -> PhaseConfig:
        for word in self.trained:
            if word not in ("all", *SETS):
                try:
                    re.compile(word)
                except re.error as exc:
                    raise FieldError(
                        "train", word,
                        f"is neither one of all, {', '.join(SETS)} nor a valid regular expression: {exc}"
                    ) from exc
        if not self.trained:
            raise FieldError("train", [], "must name at least one set of parameters")
        return self

    @property
    def trained(self) -> tuple[str, ...]:
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def new_adapters(self) -> AdaptersConfig | None:
        """The adapters that are attached, or get other ranks, at the start of this phase."""
        if isinstance(self.adapters, AdaptersConfig) and self.adapters.from_ != "keep":
            return self.adapters
        return None

    @property
    def ending(self) -> Duration | SwitchTest | None:
        """``until`` in the form that the controller needs."""
        return self.until.switch_test() if isinstance(self.until, UntilConfig) else self.until

    @property
    def switch_test(self) -> SwitchTest | None:
        """The test that ends this phase, if it does not end by a duration."""
        return None if isinstance(self.ending, Duration) else self.ending

    def spec(self, families: Sequence[str]) -> PhaseSpec:
        """The phase in the form that the controller needs.

        families: the default for adapters that do not name their families.
        """
        adapters = None
        if (fresh := self.new_adapters) is not None:
            defaults = KINDS[fresh.kind].options
            options = {name: v for name, v in fresh.options.items() if v != defaults[name]}
            adapters = Adapters(fresh.kind, tuple(fresh.families or families), fresh.rank_rule,
                                fresh.alpha_over_r, options, fresh.from_ == "resize",
                                None if fresh.ranks is None else fresh.ranks.every, fresh.rs_alpha)

        scale: Mapping[str, float] = self.lr_scale if isinstance(self.lr_scale, dict) else {
            BASE: self.lr_scale, ADAPTERS: self.lr_scale}

        return PhaseSpec(self.name, adapters, self.trained, self.ending,
                         without_defaults(scale), self.rewarm, self.freeze_below,
                         None if self.merge is None else self.merge.merge(),
                         None if self.active is None else self.active.selection(),
                         self.moments == "reset")


class PresetConfig(Strict):
    """A method by its name, and settings of its phases."""

    preset: Literal["full", "prelora", "authors"] | None = None
    """
    The method: with `full` all parameters train to the end, `prelora` has the phases full, warmup
    and lora with the parameters in `convergence` and `lora`. `authors` has the same phases as the
    code of PreLoRA's authors runs them: all adapters have the rank `lora.r_max`, and several keys of
    `convergence` and `lora` have other values ([methods.md](methods.md)). `null` takes `prelora` if
    `convergence` is set, otherwise `full`.
    """

    full: PhaseSettings = PhaseSettings()
    """Settings of the phase in which all parameters train."""

    warmup: PhaseSettings = PhaseSettings()
    """Settings of the phase in which all parameters and the adapters train."""

    lora: PhaseSettings = PhaseSettings()
    """
    Settings of the phase in which only the adapters train (and, with `lora.train_rest`, head, norms
    and embeddings).
    """


def _kind_of_phases(value: Any) -> str:
    return "as a list" if isinstance(value, list | tuple) else "as a preset"


def _inherited(phases: tuple[PhaseConfig, ...]) -> tuple[PhaseConfig, ...]:
    """``phases`` in which adapters that are kept or resized are as before, except for the keys that are set."""
    before: AdaptersConfig | None = None  # the adapters that exist after the phase before
    complete = []
    for phase in phases:
        adapters = phase.adapters
        if isinstance(adapters, AdaptersConfig):
            if adapters.from_ in ("keep", "resize") and before is not None:
                keys = KEPT_MAY_CHANGE + (LASTING if adapters.from_ == "resize" else ())
                unset = [key for key in keys if key not in adapters.model_fields_set]
                inherited = {key: getattr(before, key) for key in unset}
                adapters = adapters.model_copy(update=inherited)
                phase = phase.model_copy(update={"adapters": adapters})
            if adapters.from_ == "keep" and before is not None:
                before = before.model_copy(update={key: getattr(adapters, key) for key in KEPT_MAY_CHANGE})
            else:
                before = adapters
        complete.append(phase)
    return tuple(complete)


ListOfPhases = Annotated[tuple[PhaseConfig, ...], AfterValidator(_inherited)]
PhasesField = Annotated[
    Annotated[PresetConfig, Tag("as a preset")] | Annotated[ListOfPhases, Tag("as a list")],
    Discriminator(_kind_of_phases),
]
