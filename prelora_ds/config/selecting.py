"""`active:` of a phase: which of its adapters train at a time, and when others are chosen (DynaLoRA)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Positive, Strict
from prelora_ds.core.allocators import THRESHOLD
from prelora_ds.core.selection import ImportanceKind, Selection


class ActiveConfig(Strict):
    """Which adapters of a phase train at a time. The others keep their values, moments and Adam steps."""

    choose: Literal["top_k", "threshold", "stochastic", "discounted", "random"]
    """
    The rule: `top_k` takes the most important adapters, `threshold` the fewest that have `share` of
    all importance together, `stochastic` draws them in proportion to their importance, `discounted`
    in proportion to their importance per optimizer step that has updated them, and `random` with
    equal probability.
    """

    k: Positive | None = None
    """The number of adapters that train at a time. All rules but `threshold` need either this or `share`."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """
    With `threshold`, the share of the importance that is reached; otherwise the share of the
    adapters that train at a time, rounded up.
    """

    every: DurationField | None = None
    """How often the adapters are chosen, counted from the start of the phase."""

    once_at: DurationField | None = None
    """When they are chosen for the second and last time, in place of `every`."""

    importance: ImportanceKind = "forward"
    """
    What the importance is: `forward` is the sum over training samples of the L2 norm of a linear's
    output, `random` takes random numbers in its place, as a control. At the start of a phase nothing
    is measured yet, and the adapters are drawn with equal probability.
    """

    cut_backward: bool = False
    """
    Whether everything that the model defines before the lowest chosen adapter stops training too, so
    that the backward pass ends there.
    """

    @model_validator(mode="after")
    def _parameters_fit(self) -> ActiveConfig:
        if self.choose == THRESHOLD and (self.share is None or self.k is not None):
            raise FieldError("share", self.share, "the rule threshold needs a share and takes no k")
        if self.choose != THRESHOLD and (self.k is None) == (self.share is None):
            raise FieldError("k", self.k, f"the rule {self.choose} needs either k or share", "set one of them")
        if (self.every is None) == (self.once_at is None):
            raise FieldError("every", None if self.every is None else str(self.every),
                             "set either every or once_at", "set one of them")
        if self.every is not None and self.every.value == 0:
            raise FieldError("every", str(self.every), "must be longer than 0")
        return self

    def selection(self) -> Selection:
        """Return the selection in the form that the controller needs."""
        return Selection(self.choose, self.k, self.share, self.every, self.once_at, self.importance, self.cut_backward)
