"""`active:` of a phase: which of its adapters train at a time, and when others are chosen (DynaLoRA)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict
from prelora_ds.core.allocators import THRESHOLD
from prelora_ds.core.duration import Duration
from prelora_ds.core.selection import UNCONVERGED, ImportanceKind, Selection


class ActiveConfig(Strict):
    """Which adapters of a phase train at a time. The others keep their values, moments and Adam steps."""

    choose: Literal["top_k", "threshold", "stochastic", "discounted", "random", "unconverged"]
    """
    The rule: `top_k` takes the most important adapters, `threshold` the fewest that have `share` of
    all importance together, `stochastic` draws them in proportion to their importance, `discounted`
    in proportion to their importance per optimizer step that has updated them, and `random` with
    equal probability. `unconverged` needs no importance: from the bottom of the model upwards,
    adapters leave whose weight norm changes by at most `tau`, and they do not return.
    """

    k: Positive | None = None
    """
    The number of adapters that train at a time. All rules but `threshold` and `unconverged` need
    either this or `share`.
    """

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """
    With `threshold`, the share of the importance that is reached; otherwise the share of the
    adapters that train at a time, rounded up.
    """

    tau: Annotated[float, Field(gt=0)] | None = None
    """
    With `unconverged`, the largest change of an effective weight's norm between the last two windows
    of the phase, in per cent, of an adapter that leaves.
    """

    every: DurationField | None = None
    """How often the adapters are chosen, counted from the start of the phase."""

    once_at: DurationField | None = None
    """When they are chosen for the second and last time, in place of `every`."""

    importance: ImportanceKind = "forward"
    """
    What the importance is: `forward` is the sum over training samples of the L2 norm of a linear's
    output; `backward` is the L2 norm of an adapter's gradient before clipping. Only an adapter that
    trains has a gradient, so all of them train in the last step before each choice, and `backward` is
    summed over these steps. `random` takes random numbers in their place, as a control. At the start
    of a phase nothing is measured yet, and the adapters are drawn with equal probability.
    """

    optimizer: Literal["global", "local"] = "global"
    """
    Which learning rate an adapter has: that of the run (`global`), or that of a schedule which
    advances, from the start of the phase, only in the steps that update the adapter (`local`). Its
    Adam moments and Adam step advance only in those steps in any case.
    """

    cut_backward: bool = False
    """
    Whether everything that the model defines before the lowest chosen adapter stops training too, so
    that the backward pass ends there.
    """

    @model_validator(mode="after")
    def _parameters_fit(self) -> ActiveConfig:
        wanted = {THRESHOLD: ("share",), UNCONVERGED: ("tau",)}.get(self.choose, ("k", "share"))
        given = [key for key in ("k", "share", "tau") if getattr(self, key) is not None]
        for key in given:
            if key not in wanted:
                raise FieldError(key, getattr(self, key), f"is not used by the rule {self.choose}", f"remove {key}")
        if len(given) != 1:
            either = " or ".join(wanted)
            raise FieldError(wanted[0], getattr(self, wanted[0]),
                             f"the rule {self.choose} needs {'either ' if len(wanted) > 1 else ''}{either}",
                             f"set {'one of them' if len(wanted) > 1 else either}")
        if (self.every is None) == (self.once_at is None):
            raise FieldError("every", None if self.every is None else str(self.every),
                             "set either every or once_at", "set one of them")
        for key in ("every", "once_at"):
            self._check_length(key, getattr(self, key))
        return self

    def _check_length(self, key: str, length: Duration | None) -> None:
        if length is None:
            return
        if key == "every" and length.value == 0:
            raise FieldError(key, str(length), "must be longer than 0")
        if self.selection().measured == "backward" and length.unit == "step" and length.value < 2:
            raise FieldError(key, str(length), "is too short for importance: backward, because all adapters train in "
                             "the last step before each choice", "set at least 2 steps")

    def selection(self) -> Selection:
        """Return the selection in the form that the controller needs."""
        return Selection(self.choose, self.k, self.share, self.tau, self.every, self.once_at, self.importance,
                         self.optimizer == "local", self.cut_backward)
