"""`phases:` of a recipe: either a list of phases, or a preset with settings for single phases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from prelora_ds.config.adapters import KEPT_MAY_CHANGE, LASTING, AdaptersConfig
from prelora_ds.config.changes import RENAMED
from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict
from prelora_ds.config.merging import MergeConfig
from prelora_ds.config.quantising import BaseConfig
from prelora_ds.config.selecting import ActiveConfig
from prelora_ds.config.until import Until, UntilConfig
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import Adapters, PhaseSpec
from prelora_ds.core.plan import ADAPTERS, BASE, without_defaults
from prelora_ds.core.quantised import BF16
from prelora_ds.core.switch_tests import SwitchTest
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
    What becomes of the Adam moments and steps of the parameters that continue to train when the phase
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

    base: BaseConfig | None = None
    """
    The type of the frozen weights below the adapters; `null` keeps them in BF16. It is a setting of
    this phase only.
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
                         self.moments == "reset",
                         BF16 if self.base is None else self.base.dtype)


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
