"""The strict config tree: every value of a run, validated before anything expensive starts.

Frozen pydantic models; an unknown key is an error. This module reads nothing: `prelora_ds.config.load` makes the
tree from a recipe, overrides and a DeepSpeed JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from prelora_ds.config.data import DataConfig
from prelora_ds.config.fields import (
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
from prelora_ds.config.phases import (
    FAMILIES,
    AdaptersConfig,
    Mode,
    PhaseConfig,
    PhaseSettings,
    PhasesField,
    PreloraRule,
    PreloraUntil,
    PresetConfig,
    check_families,
    check_method,
    check_powers_of_two,
)
from prelora_ds.core.duration import Duration
from prelora_ds.core.phases import PhaseSpec

MERGED_UP_TO = 384  # hidden size


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


class ObserveConfig(Strict):
    """The weight norms and the loss are measured and logged ``every`` so often, in every run.

    Algorithm 1 is fed with these observations where there is a `convergence` section.
    """

    every: DurationField = Duration("1 epoch")


class ConvergenceConfig(Strict):
    """PreLoRA Algorithm 1: k windows of m observations, ``tau`` and ``zeta`` in per cent."""

    tau: Annotated[float, Field(gt=0)]
    zeta: Annotated[float, Field(gt=0)]
    k: Annotated[int, Field(ge=2)] = 3
    m: Positive = 3
    statistic: Literal["mean", "last"] = "mean"
    aggregate: Literal["norm_of_mean", "mean_of_layers"] = "norm_of_mean"


class LoraConfig(Strict):
    """Parameters of the preset `prelora`: the adapters, their ranks by Algorithm 2, and how they train.

    ``warmup`` is how long everything trains beside the adapters. ``train_rest`` keeps head, LayerNorms and embeddings
    (whatever is not an adapted linear) trainable in the LoRA phase. ``lr_scale`` is a factor of the learning rate of
    the adapters, and in the LoRA phase of all that trains. ``train_a: false`` leaves the A of each adapter at its
    first value (LoRA-FA). The other keys are those of `phases.*.adapters`.
    """

    families: tuple[str, ...] = FAMILIES
    r_min: Positive = 8
    r_max: Positive = 64
    warmup: DurationField = Duration("10 epochs")
    alpha_over_r: Annotated[float, Field(gt=0)] = 1.0
    dropout: Share = 0.0
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    train_a: bool = True
    train_rest: bool = True
    mode: Mode = "auto"

    @model_validator(mode="after")
    def _values_fit(self) -> LoraConfig:
        check_powers_of_two(self.r_min, self.r_max)
        check_families(self.families)
        return self


class MachineConfig(Strict):
    """What ``auto`` in `phases` goes by.

    ``memory_gib`` of a rank (by default its device's, or its share of the host's), and the rates in the file
    ``calibration`` of `prelora calibrate` (by default the GPU's data sheet).
    """

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
    observe: ObserveConfig = ObserveConfig()
    convergence: ConvergenceConfig | None = None
    lora: LoraConfig = LoraConfig()
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    phases: PhasesField = PresetConfig()
    machine: MachineConfig = MachineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    launch: LaunchConfig = LaunchConfig()

    _phase: PhaseConfig | None = PrivateAttr(default=None)  # of a config that `for_phase` made

    @property
    def phase_list(self) -> tuple[PhaseConfig, ...]:
        """The phases of the method, a preset written out."""
        return expanded(self.phases, self.convergence, self.lora) if isinstance(self.phases, PresetConfig) \
            else self.phases

    def specs(self) -> tuple[PhaseSpec, ...]:
        """The phases as the controller takes them."""
        return tuple(phase.spec(self._default_families()) for phase in self.phase_list)

    def families(self) -> tuple[str, ...]:
        """The families whose norms are measured: those that any phase adapts, or all that may be."""
        adapted = [family for spec in self.specs() if spec.adapters is not None for family in spec.adapters.families]
        return tuple(dict.fromkeys(adapted)) or self._default_families()

    def _default_families(self) -> tuple[str, ...]:
        if isinstance(self.phases, PresetConfig):
            return self.lora.families
        return FAMILIES if self.model.families is None else tuple(self.model.families)

    def for_phase(self, name: str) -> Config:
        """The config that holds in phase ``name``: its micro-batch, DeepSpeed section and adapters.

        Where the first two are ``auto`` and not resolved yet, those of the run. Raises ValueError for a phase that the
        method does not have.
        """
        own = self.phase(name)
        deepspeed = self.deepspeed if own.deepspeed is None else own.deepspeed
        if own.zero_stage not in (None, "auto"):
            zero = {**deepspeed.get("zero_optimization", {}), "stage": own.zero_stage}
            deepspeed = {**deepspeed, "zero_optimization": zero}
        micro = self.train.micro_batch_size if own.micro_batch_size in (None, "auto") else own.micro_batch_size
        train = self.train.model_copy(update={"micro_batch_size": micro})
        config = self.model_copy(update={"train": train, "deepspeed": deepspeed})
        config._phase = own
        return config

    def phase(self, name: str) -> PhaseConfig:
        """The phase ``name``. Raises ValueError for one that the method does not have."""
        for phase in self.phase_list:
            if phase.name == name:
                return phase
        raise ValueError(f"{name!r} is not a phase of this method; it has "
                         f"{', '.join(phase.name for phase in self.phase_list)}")

    def with_settings(self, name: str, settings: PhaseSettings) -> Config:
        """A copy with other settings of phase ``name``."""
        if isinstance(self.phases, PresetConfig):
            phases: Any = self.phases.model_copy(update={name: settings})
        else:
            changed = {key: getattr(settings, key) for key in PhaseSettings.model_fields}
            phases = tuple(phase.model_copy(update=changed) if phase.name == name else phase for phase in self.phases)
        return self.model_copy(update={"phases": phases})

    def with_kernel(self, mode: Mode) -> Config:
        """A copy in which the adapters of every phase compute by ``mode``."""
        if isinstance(self.phases, PresetConfig):
            return self.model_copy(update={"lora": self.lora.model_copy(update={"mode": mode})})
        phases = tuple(phase if not isinstance(phase.adapters, AdaptersConfig) else phase.model_copy(update={
            "adapters": phase.adapters.model_copy(update={"mode": mode})}) for phase in self.phases)
        return self.model_copy(update={"phases": phases})

    @property
    def adapters(self) -> AdaptersConfig:
        """How the adapters of this phase train, in a config that `for_phase` made."""
        assert self._phase is not None, "adapters belong to a phase"
        names = [phase.name for phase in self.phase_list]
        found = None
        for phase in self.phase_list[: names.index(self._phase.name) + 1]:
            if isinstance(phase.adapters, AdaptersConfig):
                found = phase.adapters
        return found or AdaptersConfig(rank=1)

    def kernel(self, stage: int | None = None) -> str:
        """How a linear with an adapter computes in this phase at ZeRO ``stage`` (by default the phase's own).

        ``auto`` goes by what was measured (benchmarks/lora_step.py): narrow blocks spend their time in calls, of which
        ``merged`` has fewer; from a width of 768 on the two are equal, and ``branch`` needs no fp32 base. Only
        ``branch`` and ``peft`` have dropout.
        """
        mode: str = self.adapters.mode
        if mode == "auto":
            narrow = self.model.factory is None and self.model.hidden_size <= MERGED_UP_TO
            mode = "merged" if narrow and (self.zero.stage if stage is None else stage) != 3 else "branch"
        return "branch" if mode == "merged" and self.adapters.dropout else mode

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
    def _method_can_be_run(self) -> Config:
        if isinstance(self.phases, PresetConfig):
            self._check_preset(self.phases)
        else:
            for section, default in (("convergence", None), ("lora", LoraConfig())):
                if getattr(self, section) != default:
                    raise FieldError(section, "...", "holds parameters of the preset prelora, and this recipe lists "
                                     "its phases; put them there")
        try:
            check_method(self.phase_list)
        except FieldError as exc:
            raise FieldError(f"phases.{exc.field}".rstrip("."), exc.value, str(exc)) from exc
        for phase in self.phase_list:
            self._check_phase(phase)
        return self

    def _check_preset(self, phases: PresetConfig) -> None:
        if phases.preset == "prelora" and self.convergence is None:
            raise FieldError("convergence", None, "is required by phases.preset prelora: set convergence.tau and "
                             "convergence.zeta")
        if phases.preset == "full" and self.convergence is not None:
            raise FieldError("convergence", "...", "is not used by phases.preset full; set convergence=null, or choose "
                             "the preset prelora")

    def _check_phase(self, phase: PhaseConfig) -> None:
        if phase.freeze_below is not None and self.model.factory is None \
                and phase.freeze_below >= self.model.num_hidden_layers:
            raise FieldError(f"phases.{phase.name}.freeze_below", phase.freeze_below,
                             f"the model has the layers 0 to {self.model.num_hidden_layers - 1}")
        own = self.for_phase(phase.name)
        if phase.zero_stage != "auto" and "all" not in phase.trained and own.adapters.mode == "merged" \
                and own.zero.stage == 3:
            key = "lora.mode" if isinstance(self.phases, PresetConfig) else f"phases.{phase.name}.adapters.mode"
            raise FieldError(key, "merged", f"{key} merged needs each weight whole on every rank, and ZeRO stage 3 "
                             f"splits them; choose branch, or stage 0, 1 or 2 for phase {phase.name}")

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


def expanded(phases: PresetConfig, convergence: ConvergenceConfig | None,
             lora: LoraConfig) -> tuple[PhaseConfig, ...]:
    """The phases of a preset, written out."""

    def phase(name: str, **keys: Any) -> PhaseConfig:
        settings: PhaseSettings = getattr(phases, name)
        return PhaseConfig(name=name, **{key: getattr(settings, key) for key in PhaseSettings.model_fields}, **keys)

    if convergence is None:
        return (phase("full"),)
    test = PreloraUntil(test="prelora", **{key: getattr(convergence, key) for key in PreloraUntil.model_fields
                                           if key != "test"})
    adapters = AdaptersConfig(
        ranks=PreloraRule(rule="prelora", r_min=lora.r_min, r_max=lora.r_max), families=lora.families,
        alpha_over_r=lora.alpha_over_r, dropout=lora.dropout, weight_decay=lora.weight_decay, mode=lora.mode,
        options={} if lora.train_a else {"train_a": False})
    trained = ("adapters", "rest") if lora.train_rest else ("adapters",)
    return (phase("full", until=test),
            phase("warmup", adapters=adapters, until=lora.warmup, lr_scale={"adapters": lora.lr_scale}),
            phase("lora", train=trained, lr_scale=lora.lr_scale))
