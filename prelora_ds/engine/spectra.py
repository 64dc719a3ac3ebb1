"""Measure the singular values of the weights, and of their changes since their first values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed import comm

from prelora_ds.core.adapters import kind_of
from prelora_ds.core.layout import Layout
from prelora_ds.core.spectra import Spectra, Spectrum
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.state import EngineState, Slice, gather_parts
from prelora_ds.engine.values import FullValues
from prelora_ds.model.adapters import effective_weight

DIGITS = 6  # the significant digits of each number, so that the log of a run stays small


def first_values(state: EngineState, layout: Layout) -> dict[str, Slice]:
    """Return copies of this rank's part of each weight that may get an adapter, from the state before the first step.

    They take 4 bytes per element, divided by the number of ranks, in host memory.
    """
    names = [f"{path}.weight" for path in layout.modules()]
    return {name: Slice(state.slices[name].start, state.slices[name].value.clone()) for name in names
            if name in state.slices}


class SpectrumMeter:
    """Measures the spectra of the weights that may get adapters, between two steps.

    first: the result of `first_values`, to which every measurement compares. It follows from the seed of the run, so no
        checkpoint contains it.

    A spectrum is that of the fp32 master of a weight, with its adapter folded in. A weight that is frozen and of which
    no fp32 value is kept is measured in BF16. Each weight is gathered, and one rank computes its spectrum in float64.
    So the result depends neither on the ZeRO stage nor on the number of ranks, except that machines may round a
    decomposition differently, far below the `DIGITS` that are kept.
    """

    def __init__(self, first: Mapping[str, Slice]) -> None:
        self._first = first
        self._first_stable_ranks: dict[str, float] = {}  # by path, of the weights that this rank computes

    @torch.no_grad()
    def measure(self, engine: Engine, beat: Callable[[], object] = lambda: None) -> Spectra:
        """Return the spectra, the same on every rank. Collective.

        beat: is called each time this rank has computed one.
        """
        rank, world = comm.get_rank(), comm.get_world_size()
        values = FullValues(engine)
        paths = engine.layout.modules()
        mine: dict[str, Spectrum] = {}
        for begin in range(0, len(paths), world):
            # All weights of a round are gathered before any of them is decomposed, so that the ranks work at a time.
            round_of_paths = paths[begin:begin + world]
            pairs = [self._gather(engine, values, path, keep=turn == rank) for turn, path in enumerate(round_of_paths)]
            if rank < len(pairs):
                mine[round_of_paths[rank]] = self._spectrum(round_of_paths[rank], *pairs[rank])
            beat()

        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, mine)
        by_path = {path: spectrum for part in parts for path, spectrum in part.items()}
        return {family: {layer: by_path[path] for layer, path in layers.items()}
                for family, layers in engine.layout.targets.items()}

    def _gather(self, engine: Engine, values: FullValues, path: str, *, keep: bool) -> tuple[torch.Tensor, ...]:
        """Return the effective weight and its first value, or nothing without ``keep``. Collective."""
        name = f"{path}.weight"
        shape = engine.layout.parameters[name]
        spec = engine.plan.adapters.get(path)
        leaves = {} if spec is None else kind_of(spec).parameters(shape, spec)
        weight = values.of(name)
        adapter = {leaf: values.of(f"{path}.{leaf}") for leaf in leaves}
        part = self._first.get(name)
        first = gather_parts(0 if part is None else part.start, None if part is None else part.value, shape,
                             engine.ds.device)
        return (effective_weight(weight, adapter, spec), first) if keep else ()

    def _spectrum(self, path: str, weight: torch.Tensor, first: torch.Tensor) -> Spectrum:
        if path not in self._first_stable_ranks:
            self._first_stable_ranks[path] = stable_rank(squared_singular_values(first))
        change = weight.double() - first.double()
        return Spectrum(
            _rounded(stable_rank(squared_singular_values(weight))),
            _rounded(self._first_stable_ranks[path]),
            tuple(map(_rounded, shares_held(squared_singular_values(change)))),
        )


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Return the squares of the singular values of ``matrix`` in float64, descending.

    They are the eigenvalues of the smaller of its two products with itself, which costs a fraction of a singular value
    decomposition. Their absolute error is about 1e-15 of the largest one, and only sums of them are used. They are NaN
    if the matrix contains a NaN or an infinity.
    """
    exact = matrix.double()
    if not exact.isfinite().all():
        return torch.full((min(exact.shape),), torch.nan, dtype=torch.float64)
    if exact.shape[0] > exact.shape[1]:
        exact = exact.t()
    ascending: torch.Tensor = torch.linalg.eigvalsh(exact @ exact.t())
    return ascending.flip(0).clamp_(min=0.0)


def stable_rank(squared: torch.Tensor) -> float:
    """Return the sum of the squared singular values over the largest of them; 0 for a matrix of zeros."""
    largest = float(squared[0])
    return 0.0 if largest == 0 else float(squared.sum()) / largest


def shares_held(squared: torch.Tensor) -> list[float]:
    """Return the shares of the sum that the 1, 2, 4, ... largest values have, as in `Spectrum.change`."""
    total = float(squared.sum())
    if total == 0:
        return []
    held = squared.cumsum(0)
    return [float(held[(1 << exponent) - 1]) / total for exponent in range((len(squared) - 1).bit_length())]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
