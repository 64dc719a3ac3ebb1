"""`adapters:` of a phase: their kind, their ranks, and how they train."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import FieldError, Positive, Share, Strict, Text
from prelora_ds.config.rank_rules import AnyRankRule
from prelora_ds.core.adapters import KINDS, AdapterSpec, Option, OptionError
from prelora_ds.core.adapters.refused import REFUSED
from prelora_ds.core.rank_rules import RANK_RULES, RankRule

_TYPES: Mapping[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
}
# What adapters that continue to train may change: how they train, but not what they are.
KEPT_MAY_CHANGE = ("dropout", "weight_decay", "mode")
# What an adapter has from its first phase on; with other ranks it continues to have it.
LASTING = ("kind", "families", "options", "alpha_over_r", "rs_alpha")
FAMILIES = ("q", "k", "v", "o", "fc1", "fc2")
Mode = Literal["auto", "peft", "branch", "merged"]


class AdapterTraining(Strict):
    """How adapters train, whatever their ranks."""

    alpha_over_r: Annotated[float, Field(gt=0)] = 1.0
    """
    LoRA's scaling alpha / r: the factor of what an adapter adds to its linear, the same for every
    rank.
    """

    rs_alpha: Annotated[float, Field(gt=0)] | None = None
    """
    The alpha of rsLoRA: each adapter is scaled by alpha / sqrt(rank) instead of by `alpha_over_r`,
    so that adapters of different ranks get different factors; `null` takes `alpha_over_r`.
    """

    dropout: Share = 0.0
    """The probability of dropout on the input of each adapter."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay of the adapters."""

    mode: Mode = "auto"
    """
    How a linear with an adapter is computed: `branch` adds the adapter's two products, `merged`
    uses one product with the merged weight (and keeps the frozen weight in fp32), `peft` is peft's
    own code. `auto` takes on a CPU the one that was measured to be fastest: `merged` for ViTs of at
    most 384 features below ZeRO stage 3, otherwise `branch`; on a GPU the one of `branch` and
    `merged` with the lower time by `machine.calibration`, or without it by the data sheet of the GPU.
    With dropout, `merged` is computed as `branch`.
    """


class AdaptersConfig(AdapterTraining):
    """The adapters of a phase."""

    kind: Text = "lora"
    """The kind of adapter; docs/methods.md has a table of them."""

    rank: Positive | None = None
    """
    One rank for all adapters. New adapters need either this or `phases.*.adapters.ranks`, unless their
    kind has no ranks. For `oft` it is the size of a block.
    """

    ranks: AnyRankRule | None = None
    """
    A rule that gives each adapter its rank. All rules but `uniform` and `random` need the windows of
    an earlier phase that ends by a test.
    """

    families: tuple[str, ...] | None = None
    """The families of linears that get adapters; `null` for all families of the model."""

    options: dict[str, Option] = Field(default_factory=dict)
    """Options of the kind, as listed in docs/methods.md."""

    from_: Literal["fresh", "keep", "merge", "resize"] = Field(default="fresh", alias="from")
    """
    Where the adapters come from: `fresh` attaches new ones where there are none; `keep` takes over
    those of the phase before, and may change only `dropout`, `weight_decay` and `mode`, each of
    which otherwise stays as it is; `merge` merges those of the phase before into the weights and
    attaches new ones; `resize` takes over those of the phase before like `keep`, but with other
    ranks, without a change of the outputs.
    """

    @model_validator(mode="after")
    def _kind_can(self) -> AdaptersConfig:
        if self.from_ in ("keep", "resize"):
            self._check_kept()
        if self.from_ == "keep":
            return self
        check_kind(self.kind)
        check_scaling(self)
        can = KINDS[self.kind].can
        check_computation(self, self.kind)
        check_has_ranks(self)
        check_has_scaling(self)
        if self.ranks is not None and not can.rank_per_module:
            raise FieldError("ranks", self.ranks.rule, f"gives each linear its own rank, but the kind {self.kind} "
                             "supports only one rank for all; set rank instead")
        check_families(self.families)
        _check_options(self.kind, self.options)
        given = [key for key in ("rank", "ranks") if getattr(self, key) is not None]
        if can.ranked and len(given) != 1:
            raise FieldError("rank", self.rank, "set either rank (one rank for all) or ranks (a rule), not both")
        return self

    def _check_kept(self) -> None:
        """Raise FieldError if a key describes adapters that an earlier phase has attached already."""
        may_change = KEPT_MAY_CHANGE + (("rank", "ranks") if self.from_ == "resize" else ())
        for key, field in type(self).model_fields.items():
            default = field.get_default(call_default_factory=True)
            value = getattr(self, key)
            if key not in ("from_", *may_change) and value != default:
                raise FieldError(
                    key,
                    value,
                    f"applies to new adapters only, but from: {self.from_} takes over the existing ones",
                    f"remove {key}",
                )

    @property
    def rank_rule(self) -> RankRule:
        if self.ranks is not None:
            return self.ranks.rank_rule()
        # A kind without ranks: any rank but 0 gives each linear its adapter.
        return RANK_RULES["uniform"](rank=self.rank or 1)


def check_families(families: Sequence[str] | None) -> None:
    """Raise FieldError if ``families`` is empty or lists a family twice."""
    if families is not None and (not families or len(set(families)) != len(families)):
        raise FieldError("families", list(families), "must name at least one family, and each only once")


def check_kind(kind: str) -> None:
    """Raise FieldError about ``kind`` if it is not one that can be attached, with the reason if that is known."""
    if kind in KINDS:
        return
    if kind in REFUSED:
        refused = REFUSED[kind]
        raise FieldError("kind", kind, refused.reason, refused.remedy)
    near = difflib.get_close_matches(kind, [*KINDS, *REFUSED], n=1)
    raise FieldError("kind", kind, f"is not a kind of adapter; known are {', '.join(KINDS)}",
                     f"did you mean {near[0]}?" if near else None)


def check_scaling(adapters: AdapterTraining) -> None:
    """Raise FieldError if two keys set the scaling of adapters."""
    if adapters.rs_alpha is not None and adapters.alpha_over_r != 1.0:
        raise FieldError("rs_alpha", adapters.rs_alpha, f"sets the scaling by the rank, but alpha_over_r sets it to "
                         f"{adapters.alpha_over_r}", "remove one of the two")


def check_has_ranks(adapters: AdaptersConfig) -> None:
    """Raise FieldError if ranks are given to adapters of a kind that has none."""
    if KINDS[adapters.kind].can.ranked:
        return
    rule = None if adapters.ranks is None else adapters.ranks.rule
    for key, value in (("rank", adapters.rank), ("ranks", rule)):
        if value is not None:
            raise FieldError(key, value, f"gives adapters ranks, but those of the kind {adapters.kind} have none",
                             "remove it, or choose a kind with ranks")


def check_has_scaling(adapters: AdaptersConfig) -> None:
    """Raise FieldError if a scaling is given to adapters of a kind that has none."""
    if KINDS[adapters.kind].can.scaled:
        return
    for key, default in (("alpha_over_r", 1.0), ("rs_alpha", None)):
        value = getattr(adapters, key)
        if value != default:
            raise FieldError(key, value, f"scales what adapters add, but those of the kind {adapters.kind} have no "
                             "such factor", "remove it")


def check_computation(adapters: AdapterTraining, kind: str, prefix: str = "") -> None:
    """Raise FieldError about a key, with ``prefix`` before it, if adapters of ``kind`` cannot be computed like this."""
    can = KINDS[kind].can
    kernels = ("auto", *can.kernels)
    if adapters.mode not in kernels:
        raise FieldError(f"{prefix}mode", adapters.mode,
                         f"is not a kernel of the kind {kind}; choose {', '.join(kernels)}")
    if adapters.dropout and not can.dropout:
        able = ", ".join(name for name, other in KINDS.items() if other.can.dropout)
        raise FieldError(f"{prefix}dropout", adapters.dropout, f"is not possible with the kind {kind}",
                         f"set it to 0, or choose a kind with dropout: {able}")


def check_resizes(adapters: AdaptersConfig, key: str, value: object) -> None:
    """Raise FieldError about ``key`` if these ``adapters`` cannot change their ranks."""
    kind, options = adapters.kind, adapters.options
    if adapters.rs_alpha is not None:
        raise FieldError(key, value, "gives adapters other ranks, but rs_alpha scales them by their rank, so the "
                         "outputs would change", "set alpha_over_r instead, or use merge")
    spec = AdapterSpec(kind, 1, 1.0, 0, options)
    leaves = KINDS[kind].parameters((1, 1), spec).keys()
    if not KINDS[kind].can.resizes:
        raise FieldError(key, value, f"gives adapters other ranks, but those of the kind {kind} cannot change theirs")
    if frozen := sorted(leaves - KINDS[kind].trains(spec)):
        raise FieldError(key, value, f"gives adapters other ranks, but {frozen[0]} keeps its first value in this "
                         "recipe (options)", "use merge, or let all of the adapter train")


def _check_options(kind: str, options: Mapping[str, Option]) -> None:
    """Raise FieldError for an option that ``kind`` does not have, or with a value that is not possible."""
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
        choices = KINDS[kind].choices.get(name)
        if choices is not None and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            raise FieldError(f"options.{name}", value, f"is not one of {', '.join(choices)}",
                             f"did you mean {near[0]}?" if near else None)
    try:
        KINDS[kind].pruning(options)
    except OptionError as exc:
        value = options.get(exc.option, defaults[exc.option])
        raise FieldError(f"options.{exc.option}", value, exc.problem) from exc
