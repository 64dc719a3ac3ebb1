"""`train:`, `optimizer:` and `observe:` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Interval, Positive, Share, Strict
from prelora_ds.core.duration import Duration


class OptimizerConfig(Strict):
    """AdamW, a linear warm-up and one cosine to ``min_lr_ratio`` of ``lr``. Decay on matrices only."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup: DurationField = Duration("10000 steps")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0


class DivergenceConfig(Strict):
    """What happens at a loss or gradient norm that is not finite, or at a loss above ``spike`` times the mean of the
    last ``over`` steps (null: no loss is too high).

    stop: end the run. skip: leave that update out, at most ``tries`` times in a row. rollback: go back to the last
    checkpoint, and leave that update out when the run comes to it again; at most ``tries`` times.
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    spike: Annotated[float, Field(gt=1)] | None = None
    over: Positive = 50
    tries: Positive = 3


class TrainConfig(Strict):
    duration: DurationField
    global_batch_size: Positive
    micro_batch_size: Positive
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: Share = 0.0
    log_every: Positive = 1
    eval_every: Interval = Duration("1 epoch")
    divergence: DivergenceConfig = DivergenceConfig()

    @model_validator(mode="after")
    def _duration_is_absolute(self) -> TrainConfig:
        if self.duration.unit == "%":
            raise FieldError("duration", str(self.duration),
                             "a run cannot last a share of itself; give steps or epochs")
        if self.duration.value == 0:
            raise FieldError("duration", str(self.duration), "a run of no steps trains nothing")
        return self


class ObserveConfig(Strict):
    """The weight norms and the loss are measured and logged ``every`` so often, in every run.

    Algorithm 1 is fed with these observations where there is a `convergence` section.
    """

    every: DurationField = Duration("1 epoch")
