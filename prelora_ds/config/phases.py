"""`phases:` of a recipe: either a list of phases, or a preset with settings for single phases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from prelora_ds.config.adapters import KEPT_MAY_CHANGE, LASTING, AdaptersConfig, check_kernel, check_resizes
from prelora_ds.config.changes import RENAMED
from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict
from prelora_ds.config.merging import MergeConfig
from prelora_ds.config.selecting import ActiveConfig
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.plan import ADAPTERS, BASE, without_defaults
from prelora_ds.core.selection import UNCONVERGED
from prelora_ds.core.switch_tests import SWITCH_TESTS, SwitchTest
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


class PreloraUntil(Algorithm1, SwitchTestConfig):
    """The end of a phase by Algorithm 1."""

    test: Literal["prelora"]
    """The test: `prelora` is Algorithm 1, which passes when weight norms and loss have settled."""


# All rules and all tests that a recipe can name; CONTRIBUTING.md says how to add one.
AnySwitchTest = PreloraUntil


def _kind_of_until(value: Any) -> str:
    return "as a test" if isinstance(value, dict | SwitchTestConfig) else "as a duration"


Until = Annotated[Annotated[DurationField, Tag("as a duration")] | Annotated[AnySwitchTest, Tag("as a test")],
                  Discriminator(_kind_of_until)]


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
    When the phase ends: after a duration, or when a test passes. A test uses only windows that
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
                                None if fresh.ranks is None else fresh.ranks.every)

        scale: Mapping[str, float] = self.lr_scale if isinstance(self.lr_scale, dict) else {
            BASE: self.lr_scale, ADAPTERS: self.lr_scale}

        return PhaseSpec(self.name, adapters, self.trained, _until(self.until),
                         without_defaults(scale), self.rewarm, self.freeze_below,
                         None if self.merge is None else self.merge.merge(),
                         None if self.active is None else self.active.selection())


class PresetConfig(Strict):
    """A method by its name, and settings of its phases."""

    preset: Literal["full", "prelora"] | None = None
    """
    The method: with `full` all parameters train to the end, `prelora` has the phases full, warmup
    and lora with the parameters in `convergence` and `lora`. `null` takes `prelora` if
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
    before: AdaptersConfig | None = None
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
            before = adapters
        complete.append(phase)
    return tuple(complete)


ListOfPhases = Annotated[tuple[PhaseConfig, ...], AfterValidator(_inherited)]
PhasesField = Annotated[
    Annotated[PresetConfig, Tag("as a preset")] | Annotated[ListOfPhases, Tag("as a list")],
    Discriminator(_kind_of_phases),
]


def check_method(phases: Sequence[PhaseConfig]) -> None:
    """Raise FieldError, with a key below `phases`, if the phases cannot run one after the other."""
    if not phases:
        raise FieldError("", [], "must contain at least one phase")
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise FieldError(f"{name}.name", name, "is the name of two phases")
    tests = any(isinstance(phase.until, SwitchTestConfig) for phase in phases)
    adapters: AdaptersConfig | None = None
    for i, phase in enumerate(phases):
        _check_until(phase, last=i + 1 == len(phases))
        adapters = _check_adapters(phase, adapters, first=i == 0, tests=tests)
        _check_roles(phase, adapters)


def _check_until(phase: PhaseConfig, *, last: bool) -> None:
    if last and phase.until is not None:
        raise FieldError(f"{phase.name}.until", _written(phase.until),
                         "must not be set in the last phase, which lasts until the end of the run; remove it")
    if not last and phase.until is None:
        raise FieldError(f"{phase.name}.until", None,
                         'is required, because another phase follows; set a duration ("20 epochs") or a test')


def _check_adapters(phase: PhaseConfig, before: AdaptersConfig | None, *, first: bool,
                    tests: bool) -> AdaptersConfig | None:
    """The adapters that exist during ``phase``; ``before`` are those of the phase before it.

    tests: whether any phase ends by a test. Raises FieldError.
    """
    key = f"{phase.name}.adapters"
    adapters = before
    if phase.adapters == "none" and before is not None:
        raise FieldError(key, "none", "would discard what the adapters of the phase before have learned; "
                         "remove the key, which keeps them")

    if (new := phase.new_adapters) is not None:
        adapters = new
        if before is not None and new.from_ == "fresh":
            raise FieldError(f"{key}.from", "fresh", "would discard what the adapters of the phase before "
                             "have learned; choose keep, resize or merge")
        if before is None and new.from_ in ("merge", "resize"):
            raise FieldError(f"{key}.from", new.from_, "there are no adapters before this phase; choose fresh")
        if new.from_ == "resize":
            check_resizes(new.kind, new.options, f"{key}.from", "resize")
        if new.ranks is not None and new.ranks.every is not None:
            _check_every(phase, new, f"{key}.ranks.every", str(new.ranks.every))
        if new.from_ == "merge" and before is not None and not KINDS[before.kind].can.merges:
            raise FieldError(f"{key}.from", "merge", f"adapters of the kind {before.kind} cannot be merged into the "
                             "weights; choose keep")
        if new.ranks is not None and new.rank_rule.windows > 0 and (first or not tests):
            raise FieldError(f"{key}.ranks.rule", new.ranks.rule, "needs the windows of a test, but no phase "
                             "before this one closes any; set a rank, or let an earlier phase end by a test")
    elif isinstance(phase.adapters, AdaptersConfig):
        if before is None:
            raise FieldError(f"{key}.from", "keep", "there are no adapters before this phase; choose fresh")
        check_kernel(phase.adapters.mode, before.kind, f"{key}.mode")
        adapters = before.model_copy(update={name: getattr(phase.adapters, name) for name in KEPT_MAY_CHANGE})

    if adapters is None and "adapters" in phase.trained:
        raise FieldError(f"{phase.name}.train", list(phase.trained),
                         "contains adapters, but there are none in this phase")
    _check_merge(phase, adapters)
    _check_active(phase, adapters, tests=tests)
    if adapters is not None and phase.zero_stage not in (None, "auto"):
        stages = KINDS[adapters.kind].can.zero_stages
        if phase.zero_stage not in stages:
            raise FieldError(f"{phase.name}.zero_stage", phase.zero_stage,
                             f"adapters of the kind {adapters.kind} train only at ZeRO stages "
                             f"{', '.join(map(str, sorted(stages)))}")
    return adapters


def _check_every(phase: PhaseConfig, new: AdaptersConfig, key: str, every: str) -> None:
    """Raise FieldError about ``key`` if the ranks cannot be chosen again during the phase."""
    check_resizes(new.kind, new.options, key, every)
    if phase.merge is not None:
        raise FieldError(key, every, f"would change the ranks within a cycle of {phase.name}.merge",
                         "remove one of the two")


def _check_merge(phase: PhaseConfig, adapters: AdaptersConfig | None) -> None:
    """Raise FieldError if the phase merges adapters that it cannot merge."""
    if phase.merge is None:
        return
    key = f"{phase.name}.merge"
    if adapters is None:
        raise FieldError(key, phase.merge.model_dump(mode="json"), "merges adapters, but there are none in this phase",
                         "remove it, or attach adapters")
    can = KINDS[adapters.kind].can
    if not (can.merges and can.restarts):
        raise FieldError(key, phase.merge.model_dump(mode="json"), f"adapters of the kind {adapters.kind} cannot be "
                         "merged and begin again", "remove it")
    if "all" in phase.trained:
        raise FieldError(f"{phase.name}.train", list(phase.trained), "trains the weights themselves, so there is "
                         f"nothing to merge adapters into ({key})", "train [adapters, rest], or remove merge")


def _check_active(phase: PhaseConfig, adapters: AdaptersConfig | None, *, tests: bool) -> None:
    """Raise FieldError if the phase selects adapters that it does not have or whose code knows no selection."""
    if phase.active is None:
        return
    key = f"{phase.name}.active"
    if adapters is None or not {"all", "adapters"} & set(phase.trained):
        raise FieldError(key, phase.active.choose, "selects adapters that train, but there are none in this phase",
                         "remove it, or train adapters")
    if phase.active.choose == UNCONVERGED and not tests:
        raise FieldError(f"{key}.choose", UNCONVERGED, "compares the windows of a test, but no phase ends by a test",
                         "choose another rule, or let a phase end by a test")
    for name in ("dropout", "mode"):
        value = getattr(adapters, name)
        if value not in (0, "auto", "branch", "merged"):
            raise FieldError(f"{phase.name}.adapters.{name}", value, "runs peft's code, which knows no inactive "
                             f"adapters ({key})", "use dropout 0 and the kernel branch or merged")


def _check_roles(phase: PhaseConfig, adapters: AdaptersConfig | None) -> None:
    """Raise FieldError if the phase scales the learning rate of a role that it does not have."""
    roles = [BASE]
    if adapters is not None:
        roles += [ADAPTERS, *KINDS[adapters.kind].roles()]
    for role, factor in phase.lr_scale.items() if isinstance(phase.lr_scale, dict) else ():
        if role not in roles:
            raise FieldError(
                f"{phase.name}.lr_scale.{role}",
                factor,
                f"is not a role in this phase, which has {', '.join(roles)}",
            )


def _until(until: Duration | SwitchTestConfig | None) -> Duration | SwitchTest | None:
    return until.switch_test() if isinstance(until, SwitchTestConfig) else until


def _written(until: Duration | SwitchTestConfig) -> Any:
    return str(until) if isinstance(until, Duration) else until.model_dump(mode="json")
