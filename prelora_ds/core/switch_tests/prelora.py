"""Partial convergence (PreLoRA, Algorithm 1): have the weight norms and the loss settled?

``m`` observations make a window, and each of the last ``k`` windows is compared with the one before. Changes are
signed and in per cent of the earlier value; the thresholds limit their magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from prelora_ds.core.codec import fields_to_json
from prelora_ds.core.spectra import Spectra
from prelora_ds.core.switch_tests.progress import Progress

Norms = Mapping[str, Mapping[int, float]]

# In per cent. A change of exactly tau must pass, but in float64 it has a rounding error of about 1e-14.
NOISE = 1e-9


@dataclass(frozen=True)
class Observation:
    """One measurement, already reduced over ranks.

    step: the optimizer step after which it was made.
    samples: the number of samples since the previous observation.
    loss: the mean loss over these samples.
    norms: family -> layer -> Frobenius norm of the effective weight.
    spectra: of the same weights; empty if the run does not observe them.
    """

    step: int
    samples: int
    loss: float
    norms: Norms
    spectra: Spectra = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return _without_no_spectra(self)


@dataclass(frozen=True)
class WindowStats:
    """One window of ``m`` observations, the unit that Algorithm 1 compares.

    loss: the mean loss over the window's samples.
    norms: family -> layer -> Frobenius norm.
    losses: the loss of each observation, oldest first; empty in a window that an earlier version closed. They do not
        count when two windows are compared for equality, because Algorithm 1 does not look at them.
    spectra: those of its last observation.
    """

    index: int
    last_step: int
    loss: float
    norms: Norms
    losses: tuple[float, ...] = field(default=(), compare=False)
    spectra: Spectra = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return _without_no_spectra(self)


def _without_no_spectra(measured: Observation | WindowStats) -> dict[str, Any]:
    """Most runs do not observe spectra, and their logs have no such key."""
    data = fields_to_json(measured)
    if not measured.spectra:
        del data["spectra"]
    return data


@dataclass(frozen=True)
class Windowing:
    """How observations become windows; only windows that were made alike can be compared.

    m: how many observations make a window.
    statistic: the norm of a window, as in `close_window`.
    sliding: whether each observation closes a window of the last ``m``. Otherwise windows share no observation.
    """

    m: int
    statistic: str = "mean"
    sliding: bool = False

    def close(self, index: int, observations: Sequence[Observation]) -> WindowStats:
        """Reduce ``observations``, oldest first, to a window."""
        return close_window(index, observations, self.statistic)

    def still_open(self, observations: Sequence[Observation]) -> tuple[Observation, ...]:
        """Those of the ``observations`` of a window that has just closed that the next window begins with."""
        return tuple(observations[len(observations) - self.m + 1:]) if self.sliding else ()

    def shared_by(self, observations: int) -> int:
        """How many of the next windows contain at least one of so many ``observations`` of an open window."""
        return min(observations, self.m - 1) if self.sliding else int(observations > 0)


@dataclass(frozen=True)
class Miss:
    """By what a test failed: the ``value`` of ``what`` is above its ``limit``; Algorithm 1 has both in per cent."""

    what: str
    value: float
    limit: float

    @property
    def excess(self) -> float:
        """The factor by which the limit is exceeded; infinity if the value is not finite."""
        return abs(self.value) / self.limit if math.isfinite(self.value) else math.inf


@dataclass(frozen=True)
class Verdict:
    """The result of a test.

    reason: the result in words.
    norm_changes: of Algorithm 1: family -> its k - 1 changes in per cent, oldest first.
    loss_changes: of Algorithm 1: the k - 1 changes of the loss in per cent, oldest first.
    miss: what exceeded its limit by the largest factor, if the test failed by a measured value.

    Both changes are empty while windows are missing.
    """

    passed: bool
    reason: str
    norm_changes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    loss_changes: tuple[float, ...] = ()
    miss: Miss | None = None


def close_window(index: int, observations: Sequence[Observation], statistic: str) -> WindowStats:
    """Reduce a window's observations, oldest first, to what Algorithm 1 compares.

    ``statistic`` selects the norm of a window: the ``"mean"`` of its measurements or the ``"last"`` of them (the paper
    leaves this open). The loss is always the sample-weighted mean over the whole window, and the spectra are those of
    the last observation.

    Raises ValueError for an unknown statistic, if there are no observations, if one has no samples, and if the
    observations differ in their families or layers.
    """
    if statistic not in ("mean", "last"):
        raise ValueError(f"statistic {statistic!r} is unknown; choose 'mean' or 'last'")
    if not observations:
        raise ValueError(f"window {index} has no observations")
    if any(seen.samples < 1 for seen in observations):
        raise ValueError(f"window {index} has an observation without samples: {[o.samples for o in observations]}")
    layout = _common_layout([seen.norms for seen in observations])
    measured = observations if statistic == "mean" else observations[-1:]
    norms = {
        family: {layer: _mean(seen.norms[family][layer] for seen in measured) for layer in layers}
        for family, layers in layout.items()
    }
    samples = sum(seen.samples for seen in observations)
    loss = sum(seen.loss * seen.samples for seen in observations) / samples
    losses = tuple(seen.loss for seen in observations)
    return WindowStats(index, observations[-1].step, loss, norms, losses, observations[-1].spectra)


def partially_converged(
    windows: Sequence[WindowStats], *, k: int, tau: float, zeta: float, aggregate: str = "norm_of_mean",
    strict: bool = False, joined: Mapping[str, Sequence[str]] | None = None
) -> Verdict:
    """PreLoRA, Algorithm 1, applied to the last ``k`` of ``windows`` (oldest first).

    It passes if in each of the k - 1 comparisons the norm of every family changed by at most ``tau`` per cent and the
    loss by at most ``zeta`` per cent, up or down. ``aggregate`` defines the change of a family: ``"norm_of_mean"`` is
    the change of the norm averaged over its layers (as in the paper), ``"mean_of_layers"`` the mean of the absolute
    changes of its layers. With ``strict`` a norm must change by less than ``tau``, as in the authors' code; the loss
    may still change by exactly ``zeta``. NaN and infinity fail, and so does a change from zero. ``joined`` is name ->
    families that are judged as one family of this name, with all linears of theirs as its layers.

    Raises ValueError for ``k`` < 2, thresholds that are not positive, an unknown aggregate, windows without families
    or layers, and windows whose families or layers differ.
    """
    if k < 2:
        raise ValueError(f"k {k} is too small; at least 2 windows are needed for a comparison")
    for name, threshold in (("tau", tau), ("zeta", zeta)):
        if not threshold > 0:
            raise ValueError(f"{name} {threshold} is not a positive number of per cent")
    if aggregate not in _AGGREGATES:
        raise ValueError(f"aggregate {aggregate!r} is unknown; choose one of {', '.join(_AGGREGATES)}")
    recent = [replace(window, norms=_joined(window.norms, joined or {})) for window in windows[-k:]]
    layout = _common_layout([window.norms for window in recent])
    if len(recent) < k:
        return Verdict(False, f"{len(recent)} of {k} windows seen, {k - len(recent)} missing", {}, ())

    pairs = list(pairwise(recent))
    family_change = _AGGREGATES[aggregate]
    norm_changes = {
        family: tuple(family_change(before.norms[family], after.norms[family]) for before, after in pairs)
        for family in layout
    }
    loss_changes = tuple(_change(before.loss, after.loss) for before, after in pairs)

    judged = [(Miss(family, change, tau), pair, "tau", strict)
              for family, changes in norm_changes.items() for change, pair in zip(changes, pairs, strict=True)]
    judged += [(Miss("loss", change, zeta), pair, "zeta", False)
               for change, pair in zip(loss_changes, pairs, strict=True)]
    failed = [entry for entry in judged if not _within(entry[0], strict=entry[3])]
    miss = None
    if failed:
        miss, (before, after), name, _ = max(failed, key=lambda entry: entry[0].excess)
        reason = (f"{miss.what} changed by {miss.value:.4g} % between windows {before.index} and {after.index} "
                  f"({name} {miss.limit:g} %)")
    else:
        norm_peak = max(abs(change) for changes in norm_changes.values() for change in changes)
        loss_peak = max(map(abs, loss_changes))
        reason = (f"all |dW| <= {norm_peak:.4g} % (tau {tau:g} %), all |dL| <= {loss_peak:.4g} % (zeta {zeta:g} %) "
                  f"over windows {recent[0].index}-{recent[-1].index}")
    return Verdict(not failed, reason, norm_changes, loss_changes, miss)


def _joined(norms: Norms, joined: Mapping[str, Sequence[str]]) -> Norms:
    """``norms`` with families joined to one. The linears of such a family are numbered, because a layer has several."""
    members = {family for families in joined.values() for family in families}
    together = {
        name: dict(enumerate(norms[family][layer] for family in families for layer in sorted(norms[family])))
        for name, families in joined.items()
    }
    return {family: layers for family, layers in norms.items() if family not in members} | together


def layer_changes(previous: WindowStats, last: WindowStats) -> dict[str, dict[int, float]]:
    """Family -> layer -> dW, the signed change of its norm between two windows in per cent.

    Raises ValueError if the windows differ in their families or layers.
    """
    layout = _common_layout([previous.norms, last.norms])
    return {
        family: {
            layer: _change(previous.norms[family][layer], last.norms[family][layer])
            for layer in layers
        }
        for family, layers in layout.items()
    }


def changes_by_layer(previous: WindowStats, last: WindowStats) -> dict[str, dict[int, float]]:
    """`layer_changes` as the input of Algorithm 2. Raises ValueError as well for a change that is not finite."""
    changes = layer_changes(previous, last)
    for family, layers in changes.items():
        for layer, change in layers.items():
            if not math.isfinite(change):
                raise ValueError(f"the norm of {family}.{layer:02d} went from {previous.norms[family][layer]} to "
                                 f"{last.norms[family][layer]} between windows {previous.index} and {last.index}: "
                                 "this change is not finite")
    return changes


def _change(before: float, after: float) -> float:
    if before == 0:
        return 0.0 if after == 0 else after * math.inf
    return (after - before) / before * 100


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    # math.fsum would raise on overflow and on mixed infinities, but a diverged run must simply not pass.
    return sum(values) / len(values)


def _norm_of_mean(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    return _change(*(_mean(norms[layer] for layer in sorted(norms)) for norms in (before, after)))


def _mean_of_layers(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    return _mean(abs(_change(before[layer], after[layer])) for layer in sorted(before))


_AGGREGATES: dict[str, Callable[[Mapping[int, float], Mapping[int, float]], float]] = {
    "norm_of_mean": _norm_of_mean,
    "mean_of_layers": _mean_of_layers,
}


def _within(change: Miss, *, strict: bool) -> bool:
    if not math.isfinite(change.value):
        return False
    return abs(change.value) < change.limit - NOISE if strict else abs(change.value) <= change.limit + NOISE


def _common_layout(measured: Sequence[Norms]) -> dict[str, list[int]]:
    """The families and layers of ``measured``, sorted, so that no result depends on the order of a dict."""
    layouts = [{family: sorted(norms[family]) for family in sorted(norms)} for norms in measured]
    for layout in layouts:
        if not layout or not all(layout.values()):
            raise ValueError(f"the norms have no families, or a family has no layers: {layout}")
        mismatched = _names(layout) ^ _names(layouts[0])
        if mismatched:
            raise ValueError(f"not measured every time: {', '.join(sorted(mismatched))}; "
                             "are these windows of different models?")
    return layouts[0] if layouts else {}


def _names(layout: Mapping[str, Sequence[int]]) -> set[str]:
    return {f"{family}.{layer:02d}" for family, layers in layout.items() for layer in layers}


@dataclass(frozen=True)
class PreloraTest:
    """Algorithm 1 with its parameters: ``tau`` and ``zeta`` in per cent, ``k`` windows of ``m`` observations.

    strict: see `partially_converged`.
    windows: whether they are "disjoint", or "sliding": each observation then closes a window of the last ``m``.
    joined: see `partially_converged`.
    """

    tau: float
    zeta: float
    k: int = 3
    m: int = 3
    statistic: str = "mean"
    aggregate: str = "norm_of_mean"
    strict: bool = False
    windows: str = "disjoint"
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)
    title = "Algorithm 1"
    needs = frozenset({"norms", "loss"})

    @property
    def windowing(self) -> Windowing:
        return Windowing(self.m, self.statistic, self.windows == "sliding")

    def __call__(self, windows: Sequence[WindowStats], progress: Progress) -> Verdict:
        return partially_converged(windows, k=self.k, tau=self.tau, zeta=self.zeta, aggregate=self.aggregate,
                                   strict=self.strict, joined=self.joined)
