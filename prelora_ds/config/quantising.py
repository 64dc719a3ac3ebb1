"""`base:` of a phase: the type in which it holds the frozen weights below its adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prelora_ds.config.fields import Strict


class BaseConfig(Strict):
    """The frozen weights below the adapters, in few bits (QLoRA)."""

    dtype: Literal["int8", "nf4"]
    """
    The type of the weights that have adapters: `int8` with a scale per row, or `nf4`, the 4 bits of
    QLoRA in blocks of 64 elements. Everything else stays in BF16.
    """

    max_output_change: Annotated[float, Field(gt=0)] = 0.05
    """
    How much the outputs may change when the phase begins or ends: the root mean square change of the
    logits of some training images, relative to that of the logits. If they change by more, the run
    warns, and the event `base` says so. It continues, because what the adapters learn includes the
    change, and because the run could not repair it.
    """
