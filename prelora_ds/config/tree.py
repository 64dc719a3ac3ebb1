"""The strict config tree: every value of a run, validated before anything expensive starts.

Frozen pydantic models; an unknown key is an error. This module reads nothing: `prelora_ds.config.load` makes the
tree from a recipe, overrides and a DeepSpeed JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prelora_ds.config.data import DataConfig
from prelora_ds.config.fields import (
    Duration,
    DurationField,
    FieldError,
    Interval,
    IntervalOrNull,
    LocalPlace,
    Positive,
    Seconds,
    Seed,
    Share,
    Strict,
    Text,
)
from prelora_ds.core.phases import plans_at_rank
from prelora_ds.core.plan import Layout, Plan

MERGED_UP_TO = 384  # hidden size
FAMILIES = ("q", "k", "v", "o", "fc1", "fc2")


class RunConfig(Strict):
    name: Text
    output_dir: LocalPlace
    seed: Seed = 0


class ModelConfig(Strict):
    """Sizes in the names of transformers' ViTConfig; or ``factory`` for any other torch module.

    ``factory`` is ``"package.module:function"``, called with ``factory_args`` and ``num_labels``; it returns a module
    that maps images ``[batch, channels, height, width]`` to logits ``[batch, num_labels]`` (or to an object with
    ``.logits``). ``activation_checkpointing`` keeps only the input of each block for backward and runs its forward pass
    twice. ``compile`` compiles each block by torch.compile, anew in each phase. ``families`` maps a family to a regular
    expression over module paths with a group ``layer``.
    """

    image_size: Positive = 224
    patch_size: Positive = 16
    num_channels: Literal[1, 3] = 3
    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    activation_checkpointing: bool = False
    compile: bool = False
    factory: str | None = None
    factory_args: dict[str, Any] = Field(default_factory=dict)
    families: dict[str, str] | None = None

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.factory is None and self.image_size % self.patch_size:
            raise FieldError("image_size", self.image_size,
                             f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.factory is None and self.hidden_size % self.num_attention_heads:
            raise FieldError("hidden_size", self.hidden_size,
                             f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.factory is not None and not re.fullmatch(r"[\w.]+:\w+", self.factory):
            raise FieldError("factory", self.factory,
                             f'factory {self.factory!r} is not of the form "package.module:function"')
        if self.factory is not None and self.families is None:
            raise FieldError("families", None, "a model.factory needs model.families: family -> regular expression "
                             "over module paths")
        for family, pattern in (self.families or {}).items():
            try:
                groups = re.compile(pattern).groupindex
            except re.error as exc:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} is not a regular expression: "
                                 f"{exc}") from exc
            if "layer" not in groups:
                raise FieldError(f"families.{family}", pattern, f"{pattern!r} has no group (?P<layer>...)")
        return self


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


class ConvergenceConfig(Strict):
    """PreLoRA Algorithm 1: k windows of m measurements, ``tau`` and ``zeta`` in per cent."""

    tau: Annotated[float, Field(gt=0)]
    zeta: Annotated[float, Field(gt=0)]
    k: Annotated[int, Field(ge=2)] = 3
    m: Positive = 3
    every: DurationField = Duration("1 epoch")
    statistic: Literal["mean", "last"] = "mean"
    aggregate: Literal["norm_of_mean", "mean_of_layers"] = "norm_of_mean"


class LoraConfig(Strict):
    """Adapters, their ranks by PreLoRA Algorithm 2, and how they train.

    ``alpha_over_r`` is LoRA's scaling, the same for every rank. ``train_rest`` keeps head, LayerNorms and embeddings
    (whatever is no adapted linear) trainable in the LoRA phase. ``mode`` is how a linear with an adapter computes
    (`prelora_ds.model.lora_linear`); ``fa`` freezes A from the first step on, ``peft`` is peft's own code, ``auto`` the
    one that was measured to be fastest (`Config.lora_mode`).
    """

    families: tuple[str, ...] = FAMILIES
    r_min: Positive = 8
    r_max: Positive = 64
    warmup: DurationField = Duration("10 epochs")
    alpha_over_r: Annotated[float, Field(gt=0)] = 1.0
    dropout: Share = 0.0
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    train_rest: bool = True
    mode: Literal["auto", "peft", "branch", "merged", "fa"] = "auto"

    @model_validator(mode="after")
    def _ranks_are_powers_of_two(self) -> LoraConfig:
        for name, rank in (("r_min", self.r_min), ("r_max", self.r_max)):
            if rank & (rank - 1):
                raise FieldError(name, rank,
                                 f"{name} {rank} is not a power of two; Algorithm 2 chooses among powers of "
                                 f"two, for example {1 << rank.bit_length() - 1} or {1 << rank.bit_length()}")
        if self.r_min > self.r_max:
            raise FieldError("r_min", self.r_min, f"r_min {self.r_min} is larger than r_max {self.r_max}")
        if not self.families or len(set(self.families)) != len(self.families):
            raise FieldError("families", list(self.families), "families must name each family once")
        return self


class PhaseConfig(Strict):
    """What differs in a phase from the full one; the global batch never does.

    ``zero_stage`` is short for a ``deepspeed`` section with another stage; ``deepspeed`` replaces the whole section.
    ``auto`` is settled at the start of a run (`prelora_ds.run.autosize`): the largest micro-batch that fits, and
    the stage with the least predicted step time.
    """

    micro_batch_size: Positive | Literal["auto"] | None = None
    zero_stage: Literal[0, 1, 2, 3, "auto"] | None = None
    deepspeed: dict[str, Any] | None = None

    @property
    def is_auto(self) -> bool:
        return "auto" in (self.micro_batch_size, self.zero_stage)


class PhasesConfig(Strict):
    """Settings per phase, for the two that follow the full one.

    ``auto`` there goes by ``memory_gib`` of a rank (by default its device's, or its share of the host's) and by the
    rates in the file ``calibration`` (of `python -m prelora_ds.run.calibrate`; by default the GPU's data sheet).
    """

    warmup: PhaseConfig = PhaseConfig()
    lora: PhaseConfig = PhaseConfig()
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    calibration: LocalPlace | None = None


class CheckpointConfig(Strict):
    """Checkpoints in ``run.output_dir/checkpoints``, each ``every`` and at the end (null: only when asked to stop).

    keep_last, keep_best: so many of the newest and of the most accurate; keep_every: those that lie on its ticks, too.
    With keep_best, an evaluation that beats all before it makes a checkpoint, whether or not one is due.
    walltime: the job's time limit, counted from the start of the rank; the run stops with a checkpoint before it.
    async: write while training goes on. deepspeed_format: write DeepSpeed's own folder into each checkpoint as well.
    """

    every: IntervalOrNull = Duration("1 epoch")
    keep_last: Positive = 2
    keep_best: Annotated[int, Field(ge=0)] = 1
    keep_every: IntervalOrNull = None
    walltime: Seconds | None = None
    async_: bool = Field(default=True, alias="async")
    deepspeed_format: bool = False


class GuardConfig(Strict):
    """hang_limit: a rank that takes no step for so long ends itself with all stacks and exit code 85."""

    hang_limit: Seconds = 1800.0


class LaunchConfig(Strict):
    """``interface``: the network interface of gloo, NCCL and MPI (null: gloo takes the one towards the master).

    ``timeout_s``: seconds within which all ranks have to come before the process group is made.
    """

    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 300.0


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of a DeepSpeed config's ``zero_optimization`` that decide bytes; DeepSpeed's defaults, in elements."""

    stage: int
    offload_optimizer: bool = False
    reduce_bucket_size: int = 500_000_000
    persistence_threshold: int = 100_000


class Config(Strict):
    """One run. ``convergence: null`` trains all parameters to the end (the baseline)."""

    run: RunConfig
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    convergence: ConvergenceConfig | None = None
    lora: LoraConfig = LoraConfig()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    phases: PhasesConfig = PhasesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    launch: LaunchConfig = LaunchConfig()

    def for_phase(self, phase: str) -> Config:
        """The config that holds in ``phase``: micro-batch and DeepSpeed section as `phases` has them for it.

        Where they are ``auto`` and not settled yet, those of the run.
        """
        own = PhaseConfig() if phase == "full" else getattr(self.phases, phase)
        deepspeed = self.deepspeed if own.deepspeed is None else own.deepspeed
        if own.zero_stage not in (None, "auto"):
            zero = {**deepspeed.get("zero_optimization", {}), "stage": own.zero_stage}
            deepspeed = {**deepspeed, "zero_optimization": zero}
        micro = self.train.micro_batch_size if own.micro_batch_size in (None, "auto") else own.micro_batch_size
        train = self.train.model_copy(update={"micro_batch_size": micro})
        return self.model_copy(update={"train": train, "deepspeed": deepspeed, "phases": PhasesConfig()})

    def plans_at_rank(self, layout: Layout, lora_rank: int) -> tuple[Plan, Plan, Plan]:
        """The plans of the full, warm-up and LoRA phases of this recipe, with one rank for all adapters."""
        return plans_at_rank(layout, lora_rank, alpha_over_r=self.lora.alpha_over_r, train_a=self.lora.mode != "fa",
                             train_rest=self.lora.train_rest)

    def lora_mode(self, stage: int | None = None) -> str:
        """``lora.mode`` as it is computed at ZeRO ``stage`` (by default the config's own).

        ``auto`` goes by what was measured (benchmarks/lora_step.py): narrow blocks spend their time in calls, of which
        ``merged`` has fewer; from a width of 768 on the two are equal, and ``branch`` needs no fp32 base. Only
        ``branch`` has dropout.
        """
        mode = self.lora.mode
        if mode == "auto":
            narrow = self.model.factory is None and self.model.hidden_size <= MERGED_UP_TO
            mode = "merged" if narrow and (self.zero.stage if stage is None else stage) != 3 else "branch"
        return "branch" if mode == "merged" and self.lora.dropout else mode

    @property
    def zero(self) -> ZeroSettings:
        """What of the DeepSpeed config the rest of the code reads."""
        zero = self.deepspeed.get("zero_optimization", {})
        defaults = ZeroSettings(stage=int(zero.get("stage", 0)))
        return ZeroSettings(
            stage=defaults.stage,
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") == "cpu",
            reduce_bucket_size=int(zero.get("reduce_bucket_size", defaults.reduce_bucket_size)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", defaults.persistence_threshold)),
        )

    @model_validator(mode="after")
    def _merged_weights_are_whole(self) -> Config:
        settled = self.phases.lora.zero_stage != "auto"
        if self.lora.mode == "merged" and settled and self.for_phase("lora").zero.stage == 3:
            raise FieldError("lora.mode", "merged",
                             "lora.mode merged needs each weight whole on every rank, and ZeRO stage 3 splits them; "
                             "choose lora.mode branch, or stage 0, 1 or 2 for the LoRA phase")
        return self

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises ValueError when the global batch is no multiple of ``micro_batch_size * world_size``, when pairs are
        mixed and a micro-batch is odd, or when ZeRO stage 0, which accumulates in BF16, would have to accumulate.
        """
        per_pass = self.train.micro_batch_size * world_size
        if self.train.global_batch_size % per_pass:
            raise ValueError(f"train.global_batch_size {self.train.global_batch_size} is not divisible by "
                             f"train.micro_batch_size {self.train.micro_batch_size} x {world_size} ranks = {per_pass}")
        if self.data.mixes and self.train.micro_batch_size % 2:
            raise ValueError(f"train.micro_batch_size {self.train.micro_batch_size} is odd, and Mixup and CutMix need "
                             "whole pairs; data.mixup=0 data.cutmix=0 leaves them out")
        accum = self.train.global_batch_size // per_pass
        if accum > 1 and self.zero.stage == 0:
            raise ValueError(f"ZeRO stage 0 accumulates gradients in BF16, and {accum} micro-batches a step would lose "
                             "bits; DeepSpeed has no fp32 accumulator there")
        return accum
