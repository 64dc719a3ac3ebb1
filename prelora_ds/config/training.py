"""`train:`, `optimizer:` and `observe:` of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prelora_ds.config.fields import DurationField, FieldError, Interval, Positive, Share, Strict
from prelora_ds.core.duration import Duration


class OptimizerConfig(Strict):
    """AdamW with a linear warm-up and one cosine decay of the learning rate."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The peak learning rate, reached at the end of the warm-up."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon, which is added to the denominator of an update."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """
    AdamW's decoupled weight decay. It applies to weight matrices only: not to biases, norms, the
    class token or position embeddings. Adapters have their own.
    """

    warmup: DurationField = Duration("10000 steps")
    """How long the learning rate rises linearly from 0 to `optimizer.lr`."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate at the end of the run, as a share of `optimizer.lr`."""

    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """
    The largest norm of the whole gradient: a larger gradient is scaled down to it; 0 disables
    clipping.
    """


class DivergenceConfig(Strict):
    """What happens when a step diverges."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """
    What to do when a step diverges: `stop` ends the run, `skip` skips the update, `rollback`
    resumes from the last checkpoint and skips that update when the run reaches it again.
    """

    spike: Annotated[float, Field(gt=1)] | None = None
    """
    A step has diverged if its loss is above this many times the mean of the last
    `train.divergence.over` losses; with `null` only a loss or gradient norm that is not finite
    counts.
    """

    over: Positive = 50
    """The number of accepted steps whose mean loss `train.divergence.spike` is compared with."""

    tries: Positive = 3
    """
    How many updates in a row `skip` may skip, or how often `rollback` may roll back, before the run
    ends.
    """


class TrainConfig(Strict):
    """Length, batch and loss of a run."""

    duration: DurationField
    """The length of the run, in steps or epochs."""

    global_batch_size: Positive
    """The number of images per optimizer step, over all ranks; no phase changes it."""

    micro_batch_size: Positive
    """
    The number of images per rank and forward pass. `train.global_batch_size` must be a multiple of
    this times the number of ranks; the quotient is the number of accumulated micro-batches, which
    is 1 at ZeRO stage 0.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """
    The loss: `softmax` is cross-entropy, `sigmoid` the sum of one binary cross-entropy per class.
    """

    label_smoothing: Share = 0.0
    """The share of each label that is spread evenly over all classes."""

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """
    The type in which gradients are sent between ranks and summed over them: `bf16` halves the bytes,
    and rounds each sum to 8 bits, as ZeRO stage 0 does in any case. The sum over micro-batches is fp32
    either way. With one rank it has no effect.
    """

    log_every: Positive = 1
    """The number of steps between two rows of metrics.jsonl."""

    eval_every: Interval = Duration("1 epoch")
    """How often the model is evaluated on `data.val`, besides at the end of the run."""

    divergence: DivergenceConfig = DivergenceConfig()
    """What happens when a step diverges."""

    @model_validator(mode="after")
    def _duration_is_absolute(self) -> TrainConfig:
        if self.duration.unit == "%":
            raise FieldError("duration", str(self.duration),
                             "must be given in steps or epochs, not in per cent")
        if self.duration.value == 0:
            raise FieldError("duration", str(self.duration), "must be longer than zero")
        return self


class ObserveConfig(Strict):
    """How often weight norms and loss are measured."""

    every: DurationField = Duration("1 epoch")
    """
    How often the weight norms and the mean loss are measured and logged, in every run. A test that
    ends a phase uses these observations.
    """

    spectra: bool = False
    """
    Whether each observation also measures singular values: the stable rank of each weight that may
    get an adapter, and how much of its change since the start of the run the largest singular values
    have. Some rules for ranks and some tests need them. They take the time of an eigenvalue
    decomposition per weight, and 4 bytes of host memory per element, both divided by the number of
    ranks.
    """
