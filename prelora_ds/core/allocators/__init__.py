"""Which adapters train next (DynaLoRA): rules that choose adapters by their importance.

A rule is a pure function. Its random choices come from a generator that the caller seeds, so that every rank and every
world size chooses the same adapters. Adapters of equal importance are taken in alphabetical order.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Mapping, Sequence

Importance = Mapping[str, float]

# A sum of shares may end a hair below the share that it should reach, and that hair must not add an adapter.
_NOISE = 1e-9


def top_k(importance: Importance, k: int, rng: random.Random) -> list[str]:
    """Return the ``k`` most important adapters."""
    return _by_importance(importance)[:k]


def stochastic(importance: Importance, k: int, rng: random.Random) -> list[str]:
    """Draw ``k`` adapters without replacement, each with a probability in proportion to its importance.

    Adapters of importance 0 are drawn, with equal probability, only when no other is left.
    """
    left = {adapter: importance[adapter] for adapter in sorted(importance)}
    drawn: list[str] = []
    while len(drawn) < k:
        total = math.fsum(left.values())
        weights = left if total > 0 else dict.fromkeys(left, 1.0)
        drawn.append(_draw(weights, rng))
        del left[drawn[-1]]
    return drawn


def uniform(importance: Importance, k: int, rng: random.Random) -> list[str]:
    """Draw ``k`` adapters without replacement, all with the same probability."""
    return rng.sample(sorted(importance), k)


def threshold(importance: Importance, share: float) -> list[str]:
    """Return the fewest adapters, the most important first, that together have ``share`` of all importance."""
    order = _by_importance(importance)
    total = math.fsum(importance.values())
    if total == 0:  # every adapter is as important as every other
        return order[: max(1, math.ceil(share * len(order) - _NOISE))]
    for count in range(1, len(order)):
        if math.fsum(importance[adapter] for adapter in order[:count]) >= (share - _NOISE) * total:
            return order[:count]
    return order


RULES: dict[str, Callable[[Importance, int, random.Random], list[str]]] = {
    "top_k": top_k,
    "stochastic": stochastic,
    "discounted": stochastic,  # on importance that is divided by updates
    "random": uniform,
}
THRESHOLD = "threshold"
NAMES = (*RULES, THRESHOLD)


def select(name: str, importance: Importance, *, k: int | None = None, share: float | None = None,
           updates: Mapping[str, float] | None = None, rng: random.Random) -> frozenset[str]:
    """Return the adapters that the rule ``name`` chooses.

    importance: adapter -> a number of at least 0, of which only proportions count.
    k: how many adapters to choose.
    share: in (0, 1]. For ``threshold``, the share of all importance that the chosen adapters have together; for the
    other rules, the share of the adapters that is chosen, rounded up.
    updates: for ``discounted``, adapter -> the number of optimizer steps that have updated it. Importance is divided by
    it (by at least 1), so that adapters that trained little are preferred.

    Raises ValueError for an unknown rule, for a parameter that is missing, not used by the rule or out of range, and
    for importance that is negative or not finite.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the rules are {', '.join(NAMES)}"
        raise ValueError(f"{name!r} is not a rule for choosing adapters; {hint}")
    importance = _normalised(importance)
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share = {share} is not in (0, 1]")

    if name == THRESHOLD:
        if share is None or k is not None:
            raise ValueError("threshold needs a share and takes no k")
        return frozenset(threshold(importance, share))

    k = _count(name, len(importance), k, share)
    if name == "discounted":
        if updates is None:
            raise ValueError("discounted needs the number of updates of each adapter")
        importance = {adapter: value / max(1, updates.get(adapter, 0)) for adapter, value in importance.items()}
    return frozenset(RULES[name](importance, k, rng))


def _count(name: str, adapters: int, k: int | None, share: float | None) -> int:
    if (k is None) == (share is None):
        raise ValueError(f"{name} needs either k or share")
    if k is None:
        assert share is not None
        return max(1, math.ceil(share * adapters - _NOISE))
    if not 1 <= k <= adapters:
        raise ValueError(f"k = {k} is not between 1 and {adapters}, the number of adapters")
    return k


def _normalised(importance: Importance) -> dict[str, float]:
    """Return the importance divided by its largest value, so that no sum can overflow."""
    if not importance:
        raise ValueError("there are no adapters to choose from")
    for adapter, value in importance.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"the importance of {adapter} is {value}; it must be finite and at least 0")
    largest = max(importance.values()) or 1.0
    return {adapter: value / largest for adapter, value in importance.items()}


def _by_importance(importance: Importance) -> list[str]:
    return sorted(importance, key=lambda adapter: (-importance[adapter], adapter))


def _draw(weights: Mapping[str, float], rng: random.Random) -> str:
    adapters: Sequence[str] = list(weights)
    return rng.choices(adapters, [weights[adapter] for adapter in adapters])[0]
