"""Rank 0: layers whose weights have settled get no adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prelora_ds.core.switch_tests.prelora import WindowStats, changes_by_layer

Ranks = Mapping[str, Mapping[int, int]]


def without_settled(ranks: Ranks, windows: Sequence[WindowStats], settled: float) -> dict[str, dict[int, int]]:
    """Return ``ranks`` (family -> layer -> rank), with 0 for each layer that has settled.

    A layer has settled if the norm of its weight changed by at most ``settled`` per cent between the last two windows.
    If all of them have, the one that changed most keeps its rank, because a phase that trains adapters needs one.

    Raises ValueError if a change is not finite.
    """
    changes = changes_by_layer(*windows[-2:])
    sizes = {(family, layer): abs(changes[family][layer]) for family, layers in ranks.items() for layer in layers}
    most = max(sizes, key=lambda place: sizes[place])
    return {family: {layer: rank if sizes[family, layer] > settled or (family, layer) == most else 0
                     for layer, rank in layers.items()}
            for family, layers in ranks.items()}
