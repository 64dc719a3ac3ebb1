"""`ranks:` of adapters: the rules that give each of them its rank."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, field_validator, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict, chosen_by
from prelora_ds.core.duration import Duration
from prelora_ds.core.rank_rules import RANK_RULES, RankRule
from prelora_ds.core.rank_rules.prelora import Changes
from prelora_ds.core.rank_rules.random import Draw


class RankRuleConfig(Strict):
    """A rule that gives each adapter its rank: its name and its parameters."""

    rule: str

    every: DurationField | None = None
    """
    How often the ranks are chosen again during the phase, by the windows that have closed until
    then; `null` never does. An adapter that gets another rank is resized as with `from: resize`.
    """

    @field_validator("every")
    @classmethod
    def _is_longer_than_nothing(cls, every: Duration | None) -> Duration | None:
        if every is not None and every.value == 0:
            raise FieldError("", str(every), "must be longer than 0")
        return every

    @property
    def leaves_out(self) -> bool:
        """Whether the rule may leave linears without an adapter."""
        return False

    def rank_rule(self) -> RankRule:
        return RANK_RULES[self.rule](**self.model_dump(exclude={"rule", "every"}))


class PowersOfTwo(RankRuleConfig):
    """A rule that chooses among the powers of two between two bounds."""

    r_min: Positive = 8
    """The smallest rank; a power of two."""

    r_max: Positive = 64
    """The largest rank; a power of two, and at least the smallest."""

    @model_validator(mode="after")
    def _ranks_are_powers_of_two(self) -> PowersOfTwo:
        check_powers_of_two(self.r_min, self.r_max)
        return self


class PreloraRule(PowersOfTwo):
    """Ranks by PreLoRA's Algorithm 2: powers of two, the larger the more a layer still changes."""

    rule: Literal["prelora"]
    """
    The rule: `prelora` is Algorithm 2, which gives the layers that still change most the largest
    ranks.
    """

    changes: Changes = "abs"
    """
    What Algorithm 2 compares: the magnitudes of the changes of the weight norms (`abs`, as in the
    authors' code), or the changes themselves (`signed`, as the paper writes them), so that the
    layer whose norm shrinks most gets the smallest rank.
    """


class UniformRule(RankRuleConfig):
    """The same rank for all adapters, as with `phases.*.adapters.rank`."""

    rule: Literal["uniform"]
    """The rule: `uniform` gives all adapters the same rank."""

    rank: Positive
    """The rank of all adapters."""


class RandomRule(PowersOfTwo):
    """Ranks that are drawn at random, as a control of Algorithm 2."""

    rule: Literal["random"]
    """The rule: `random` draws the ranks from `run.seed`."""

    draw: Draw = "independent"
    """
    What is drawn: with `independent` each adapter gets a power of two with equal probability;
    `permuted` deals the ranks that Algorithm 2 gives to the layers of a family out among them at
    random, so that their mean and the number of parameters are the same as with `prelora`.
    """


class SettlingRule(RankRuleConfig):
    """A rule that may leave layers without an adapter."""

    r_min: Annotated[int, Field(ge=0)] = 8
    """
    The smallest rank. With 0 a layer that has settled (`settled`) gets no adapter, and its weight
    stays frozen where those of the other layers do; every other layer gets at least rank 1.
    """

    r_max: Positive = 64
    """The largest rank, at least the smallest."""

    settled: Annotated[float, Field(gt=0)] | None = None
    """
    With `r_min: 0`, the largest change of the weight norm of a layer that has settled, between the
    last two windows, in per cent. If all layers have settled, the one that changed most gets an
    adapter nevertheless.
    """

    @property
    def leaves_out(self) -> bool:
        return self.r_min == 0

    @model_validator(mode="after")
    def _bounds_fit(self) -> SettlingRule:
        check_order(self.r_min, self.r_max)
        if self.leaves_out and self.settled is None:
            raise FieldError("settled", None, "is required with r_min 0, which leaves layers without an adapter once "
                             "they have settled", "set it in per cent, or r_min to at least 1")
        if self.settled is not None and not self.leaves_out:
            raise FieldError("settled", self.settled, f"is not used with r_min {self.r_min}, which gives every layer "
                             "an adapter", "set r_min to 0, or remove settled")
        return self


class StableRankRule(SettlingRule):
    """Ranks in proportion to the part of its first stable rank that each weight still has."""

    rule: Literal["stable_rank"]
    """
    The rule: `stable_rank` gives a layer `r_max` times the stable rank of its weight over that of
    its first value, rounded up, as in Cuttlefish. It needs `observe.spectra`.
    """


class EnergyRule(SettlingRule):
    """The smallest rank that holds a share of what a weight has changed since the start of the run."""

    rule: Literal["energy"]
    """
    The rule: `energy` gives a layer the smallest power of two that holds `share` of its change. It
    needs `observe.spectra`.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    """
    The share of the sum of the squared singular values of W - W0 that so many of the largest ones
    have; W0 is the first value of the weight.
    """

    @model_validator(mode="after")
    def _ranks_are_powers_of_two(self) -> EnergyRule:
        check_powers_of_two(max(self.r_min, 1), self.r_max)
        return self


_BY_NAME, _CHECK_NAME = chosen_by("rule", RANK_RULES, "a rule for ranks", "{rule: prelora, r_min: 8, r_max: 64}")

# All rules that a recipe can name.
AnyRankRule = Annotated[
    Annotated[PreloraRule, Tag("prelora")]
    | Annotated[UniformRule, Tag("uniform")]
    | Annotated[RandomRule, Tag("random")]
    | Annotated[StableRankRule, Tag("stable_rank")]
    | Annotated[EnergyRule, Tag("energy")],
    _BY_NAME,
    _CHECK_NAME,
]


def check_powers_of_two(r_min: int, r_max: int) -> None:
    """Raise FieldError for bounds between which no rule can choose powers of two."""
    for name, rank in (("r_min", r_min), ("r_max", r_max)):
        if rank & (rank - 1):
            raise FieldError(name, rank, f"{name} {rank} is not a power of two, but the ranks are chosen among powers "
                             f"of two; use for example {1 << rank.bit_length() - 1} or {1 << rank.bit_length()}")
    check_order(r_min, r_max)


def check_order(r_min: int, r_max: int) -> None:
    """Raise FieldError for bounds in the wrong order."""
    if r_min > r_max:
        raise FieldError("r_min", r_min, f"r_min {r_min} is larger than r_max {r_max}")
