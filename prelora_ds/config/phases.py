"""`phases:` of a recipe: either a list of phases, or a preset with settings for single phases."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from prelora_ds.config.changes import RENAMED
from prelora_ds.config.fields import DurationField, FieldError, Positive, Share, Strict, Text
from prelora_ds.core.adapters import KINDS, Option
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.plan import ADAPTERS, BASE, without_defaults
from prelora_ds.core.rank_rules import RANK_RULES, RankRule
from prelora_ds.core.switch_tests import SWITCH_TESTS, SwitchTest
from prelora_ds.core.trainable import SETS

_TYPES: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
}
# What adapters that are kept may change: how they train, but not what they are.
KEPT_MAY_CHANGE = ("dropout", "weight_decay", "mode")
FAMILIES = ("q", "k", "v", "o", "fc1", "fc2")
Mode = Literal["auto", "peft", "branch", "merged"]


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


class RankRuleConfig(Strict):
    """A rule that gives each adapter its rank: its name and its parameters."""

    rule: str

    def rank_rule(self) -> RankRule:
        return RANK_RULES[self.rule](**self.model_dump(exclude={"rule"}))


class SwitchTestConfig(Strict):
    """A test that ends a phase: its name and its parameters."""

    test: str

    def switch_test(self) -> SwitchTest:
        return SWITCH_TESTS[self.test](**self.model_dump(exclude={"test"}))


class PreloraRule(RankRuleConfig):
    """Ranks by PreLoRA's Algorithm 2: powers of two, the larger the more a layer still changes."""

    rule: Literal["prelora"]
    """
    The rule: `prelora` is Algorithm 2, which gives the layers that still change most the largest
    ranks.
    """

    r_min: Positive = 8
    """The smallest rank; a power of two."""

    r_max: Positive = 64
    """The largest rank; a power of two, and at least the smallest."""

    @model_validator(mode="after")
    def _ranks_are_powers_of_two(self) -> PreloraRule:
        check_powers_of_two(self.r_min, self.r_max)
        return self


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
AnyRankRule = PreloraRule
AnySwitchTest = PreloraUntil


class AdapterTraining(Strict):
    """How adapters train, whatever their ranks."""

    alpha_over_r: Annotated[float, Field(gt=0)] = 1.0
    """
    LoRA's scaling alpha / r: the factor of what an adapter adds to its linear, the same for every
    rank.
    """

    dropout: Share = 0.0
    """The probability of dropout on the input of each adapter."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay of the adapters."""

    mode: Mode = "auto"
    """
    How a linear with an adapter is computed: `branch` adds the adapter's two products, `merged`
    uses one product with the merged weight (and keeps the frozen weight in fp32), `peft` is peft's
    own code. `auto` takes the one that was measured to be fastest: `merged` for ViTs of at most 384
    features below ZeRO stage 3, otherwise `branch`. With dropout, `merged` is computed as `branch`.
    """


class AdaptersConfig(AdapterTraining):
    """The adapters of a phase."""

    kind: Text = "lora"
    """The kind of adapter; `lora` is the only one."""

    rank: Positive | None = None
    """One rank for all adapters. New adapters need either this or `phases.*.adapters.ranks`."""

    ranks: AnyRankRule | None = None
    """
    A rule that gives each adapter its rank, from the windows of an earlier phase that ends by a
    test.
    """

    families: tuple[str, ...] | None = None
    """The families of linears that get adapters; `null` for all families of the model."""

    options: dict[str, Option] = Field(default_factory=dict)
    """Options of the kind. `lora` has one, `train_a`: `false` leaves A at its first value (LoRA-FA)."""

    from_: Literal["fresh", "keep"] = Field(default="fresh", alias="from")
    """
    Where the adapters come from: `fresh` attaches new ones where there are none; `keep` takes over
    those of the phase before, and may change only `dropout`, `weight_decay` and `mode`, each of
    which otherwise stays as it is.
    """

    @model_validator(mode="after")
    def _kind_can(self) -> AdaptersConfig:
        if self.from_ == "keep":
            self._check_kept()
            return self
        if self.kind not in KINDS:
            raise FieldError("kind", self.kind, f"is not a kind of adapter; known are {', '.join(KINDS)}")
        can = KINDS[self.kind].can
        _check_kernel(self.mode, self.kind)
        if self.ranks is not None and not can.rank_per_module:
            raise FieldError("ranks", self.ranks.rule, f"gives each linear its own rank, but the kind {self.kind} "
                             "supports only one rank for all; set rank instead")
        check_families(self.families)
        _check_options(self.kind, self.options)
        given = [key for key in ("rank", "ranks") if getattr(self, key) is not None]
        if len(given) != 1:
            raise FieldError("rank", self.rank, "set either rank (one rank for all) or ranks (a rule), not both")
        return self

    def _check_kept(self) -> None:
        """Raise FieldError if a key says what the adapters are, which were attached before."""
        for key, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True)
            value = getattr(self, key)
            if key not in ("from_", *KEPT_MAY_CHANGE) and value != default:
                raise FieldError(
                    key,
                    value,
                    "applies to new adapters only, but from: keep takes over the existing ones",
                    f"remove {key}",
                )

    @property
    def rank_rule(self) -> RankRule:
        if self.ranks is not None:
            return self.ranks.rank_rule()
        return RANK_RULES["uniform"](rank=self.rank)


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
        """The adapters that are attached at the start of this phase."""
        if isinstance(self.adapters, AdaptersConfig) and self.adapters.from_ == "fresh":
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
                                fresh.alpha_over_r, options)

        scale: Mapping[str, float] = self.lr_scale if isinstance(self.lr_scale, dict) else {
            BASE: self.lr_scale, ADAPTERS: self.lr_scale}

        return PhaseSpec(self.name, adapters, self.trained, _until(self.until),
                         without_defaults(scale), self.rewarm, self.freeze_below)


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
    """``phases`` in which adapters that are kept train as before, except for the keys that are set."""
    before: AdaptersConfig | None = None
    complete = []
    for phase in phases:
        adapters = phase.adapters
        if isinstance(adapters, AdaptersConfig):
            if adapters.from_ == "keep" and before is not None:
                unset = [key for key in KEPT_MAY_CHANGE if key not in adapters.model_fields_set]
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
        if before is not None:
            raise FieldError(f"{key}.from", "fresh", "would discard what the adapters of the phase before "
                             "have learned; choose keep")
        if new.ranks is not None and new.rank_rule.windows > 0 and (first or not tests):
            raise FieldError(f"{key}.ranks.rule", new.ranks.rule, "needs the windows of a test, but no phase "
                             "before this one closes any; set a rank, or let an earlier phase end by a test")
    elif isinstance(phase.adapters, AdaptersConfig):
        if before is None:
            raise FieldError(f"{key}.from", "keep", "there are no adapters before this phase; choose fresh")
        _check_kernel(phase.adapters.mode, before.kind, f"{key}.mode")

    if adapters is None and "adapters" in phase.trained:
        raise FieldError(f"{phase.name}.train", list(phase.trained),
                         "contains adapters, but there are none in this phase")
    if adapters is not None and phase.zero_stage not in (None, "auto"):
        stages = KINDS[adapters.kind].can.zero_stages
        if phase.zero_stage not in stages:
            raise FieldError(f"{phase.name}.zero_stage", phase.zero_stage,
                             f"adapters of the kind {adapters.kind} train only at ZeRO stages "
                             f"{', '.join(map(str, sorted(stages)))}")
    return adapters


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


def _check_kernel(mode: str, kind: str, key: str = "mode") -> None:
    """Raise FieldError about ``key`` if adapters of ``kind`` cannot be computed by ``mode``."""
    kernels = ("auto", *KINDS[kind].can.kernels)
    if mode not in kernels:
        raise FieldError(
            key, mode, f"is not a kernel of the kind {kind}; choose {', '.join(kernels)}"
        )


def _check_options(kind: str, options: Mapping[str, Option]) -> None:
    """Raise FieldError for an option that ``kind`` does not have, or with another type."""
    defaults = KINDS[kind].options
    for name, value in options.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            known = ", ".join(defaults) or "none"
            raise FieldError(
                f"options.{name}",
                value,
                f"is not an option of the kind {kind}",
                f"did you mean {near[0]}?" if near else f"the kind {kind} has these options: {known}",
            )

        wanted = type(defaults[name])
        if type(value) not in ({int, float} if wanted is float else {wanted}):
            raise FieldError(
                f"options.{name}",
                value,
                f"is not {_TYPES[wanted]}",
                f"the default is {json.dumps(defaults[name])}",
            )


def check_families(families: Sequence[str] | None) -> None:
    """Raise FieldError if ``families`` is empty or lists a family twice."""
    if families is not None and (not families or len(set(families)) != len(families)):
        raise FieldError("families", list(families), "must name at least one family, and each only once")


def check_powers_of_two(r_min: int, r_max: int) -> None:
    """Raise FieldError for bounds that Algorithm 2 cannot use."""
    for name, rank in (("r_min", r_min), ("r_max", r_max)):
        if rank & (rank - 1):
            raise FieldError(name, rank, f"{name} {rank} is not a power of two, and Algorithm 2 picks powers of "
                             f"two; use for example {1 << rank.bit_length() - 1} or {1 << rank.bit_length()}")
    if r_min > r_max:
        raise FieldError("r_min", r_min, f"r_min {r_min} is larger than r_max {r_max}")


def _until(until: Duration | SwitchTestConfig | None) -> Duration | SwitchTest | None:
    return until.switch_test() if isinstance(until, SwitchTestConfig) else until


def _written(until: Duration | SwitchTestConfig) -> Any:
    return str(until) if isinstance(until, Duration) else until.model_dump(mode="json")
