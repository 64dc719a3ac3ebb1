"""The strict config tree: every value of a run, validated before anything expensive starts.

It consists of frozen pydantic models, and an unknown key is an error. This module reads no files:
`prelora_ds.config.load` makes the tree from a recipe, overrides and a DeepSpeed JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from prelora_ds.config.adapters import FAMILIES, AdaptersConfig, Mode
from prelora_ds.config.data import DataConfig
from prelora_ds.config.fields import (
    FieldError,
    LocalPlace,
    Seed,
    Strict,
    Text,
)
from prelora_ds.config.job import CheckpointConfig, GuardConfig, LaunchConfig, MachineConfig
from prelora_ds.config.method import check_method
from prelora_ds.config.model import ModelConfig
from prelora_ds.config.phases import (
    PhaseConfig,
    PhaseSettings,
    PhasesField,
    PresetConfig,
)
from prelora_ds.config.preset import ConvergenceConfig, LoraConfig, expanded
from prelora_ds.config.sections import check_preset, check_sections
from prelora_ds.config.training import ObserveConfig, OptimizerConfig, TrainConfig
from prelora_ds.core.adapters import KINDS
from prelora_ds.core.phases import PhaseSpec
from prelora_ds.core.plan import Plan
from prelora_ds.core.selection import Measured

MERGED_MAX_WIDTH = 384  # of model.hidden_size, for the kernel `auto`


class RunConfig(Strict):
    """Name, folder and seed of a run."""

    name: Text
    """The name of the run, which is also the name of its batch job."""

    output_dir: LocalPlace
    """
    The folder for logs, checkpoints and the exported model, on a file system that all hosts see.
    One run has one folder.
    """

    seed: Seed = 0
    """
    The seed of the model's first values, the order of samples, the augmentation and the dropout.
    """

    deterministic: bool = False
    """
    Whether a GPU computes every step with kernels that give the same bits in each run, some of which
    are slower. Without it a resumed run agrees within rounding there; on a CPU it changes nothing.
    """

    trackers: tuple[Literal["tensorboard", "csv", "wandb", "comet"], ...] = ("tensorboard",)
    """
    Where the metrics go besides metrics.jsonl: `wandb` is Weights & Biases. [trackers.md](trackers.md)
    has the details.
    """

    project: Text = "prelora_ds"
    """The project at W&B or Comet that the run belongs to."""

    @field_validator("trackers")
    @classmethod
    def _named_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("names a tracker twice")
        return trackers


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of communication and ZeRO that affect memory and time; sizes are in elements.

    reduce_bucket_size: as the user has set it; None stands for several buckets (`cost.bytes.bucket_elements`).
    overlap_comm: whether gradients are reduced while the backward pass goes on; False at stages 0 and 1, which reduce
        after it.
    reduce_bytes: the bytes of an element of a gradient that is sent to other ranks.
    """

    stage: int
    offload_optimizer: bool = False
    reduce_bucket_size: int | None = None
    persistence_threshold: int = 100_000
    overlap_comm: bool = False
    reduce_bytes: int = 4


class Config(Strict):
    """The config of one run."""

    run: RunConfig
    """The name, the output folder and the seed of the run."""

    model: ModelConfig = ModelConfig()
    """
    The Vision Transformer to train. The sizes have the names of transformers' ViTConfig, and the
    defaults are those of ViT-B/16.
    """

    data: DataConfig
    """
    Where the images come from, and how they are preprocessed and augmented; [data.md](data.md) has
    the details.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    """
    AdamW and its learning rate: a linear warm-up to `optimizer.lr`, then one cosine to
    `optimizer.min_lr_ratio` of it at the end of the run, whatever the phases.
    """

    train: TrainConfig
    """The length of the run, the batch and the loss."""

    observe: ObserveConfig = ObserveConfig()
    """How often the weight norms and the loss are measured."""

    convergence: ConvergenceConfig | None = None
    """
    The parameters of Algorithm 1, which ends the full phase of the preset `prelora`. With `null`
    and no list of phases, all parameters train to the end (the baseline).
    """

    lora: LoraConfig = LoraConfig()
    """
    The adapters of the preset `prelora`: their ranks by Algorithm 2, and how they train. `null`
    stands for the defaults.
    """

    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"zero_optimization": {"stage": 0}})
    """
    A DeepSpeed config for all phases that have none of their own, the same as a file given by
    `--deepspeed_config`.
    """

    phases: PhasesField = PresetConfig()
    """
    The method: a list of phases, or a preset with settings for single phases.
    [methods.md](methods.md) explains both.
    """

    machine: MachineConfig = MachineConfig()
    """What `auto` in `phases` knows about the machine."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """
    Which checkpoints are written to `checkpoints` in `run.output_dir`, and which are kept;
    [checkpoints.md](checkpoints.md) has the details.
    """

    guard: GuardConfig = GuardConfig()
    """The watchdog thread of each rank."""

    launch: LaunchConfig = LaunchConfig()
    """How the ranks find each other."""

    _phase: PhaseConfig | None = PrivateAttr(default=None)  # set in a config that `for_phase` returned

    @property
    def phase_list(self) -> tuple[PhaseConfig, ...]:
        """The phases of the method; a preset is expanded into its phases."""
        if isinstance(self.phases, PresetConfig):
            return expanded(self.phases, self.convergence, self.lora)
        return self.phases

    def specs(self) -> tuple[PhaseSpec, ...]:
        """The phases in the form that the controller needs."""
        return tuple(phase.spec(self._default_families()) for phase in self.phase_list)

    def trained_phases(self) -> list[dict[str, Any]]:
        """What each phase trains, in a normal form: equal for phases that train alike.

        The keys and values are those of a recipe, but also of a preset they are those of a list.
        """
        normal = []
        for phase, spec in zip(self.phase_list, self.specs(), strict=True):
            shown = phase.model_dump(mode="json")
            new = phase.new_adapters
            training = self.for_phase(phase.name).adapters
            adapters: dict[str, Any] = {}
            if new is not None and spec.adapters is not None:
                adapters["from"] = new.from_
                for key in ("kind", "rank", "ranks", "alpha_over_r", "rs_alpha"):
                    adapters[key] = shown["adapters"][key]
                adapters["families"] = list(spec.adapters.families)
                adapters["options"] = dict(spec.adapters.options)
            adapters["dropout"] = training.dropout
            adapters["weight_decay"] = training.weight_decay
            normal.append({
                "name": phase.name,
                "adapters": adapters,
                "train": sorted(set(spec.train)),
                "until": shown["until"],
                "lr_scale": dict(spec.lr_scale),
                "rewarm": shown["rewarm"],
                "freeze_below": spec.freeze_below,
                "merge": shown["merge"],
                "base": {"dtype": spec.base_dtype},
                "active": shown["active"],
            })
        return normal

    def families(self) -> tuple[str, ...]:
        """The families whose norms are measured: those that any phase adapts, otherwise all that it could adapt."""
        adapted = [
            family
            for spec in self.specs() if spec.adapters is not None
            for family in spec.adapters.families
        ]
        return tuple(dict.fromkeys(adapted)) or self._default_families()

    def _default_families(self) -> tuple[str, ...]:
        if isinstance(self.phases, PresetConfig):
            return self.lora.families
        return FAMILIES if self.model.families is None else tuple(self.model.families)

    def for_phase(self, name: str) -> Config:
        """The config in effect in phase ``name``: its micro-batch size, DeepSpeed section and adapters.

        An unresolved ``auto`` of the first two falls back to the run's value. Raises ValueError for a
        phase that the method does not have.
        """
        phase = self.phase(name)

        deepspeed = self.deepspeed if phase.deepspeed is None else phase.deepspeed
        if phase.zero_stage not in (None, "auto"):
            zero = {**deepspeed.get("zero_optimization", {}), "stage": phase.zero_stage}
            deepspeed = {**deepspeed, "zero_optimization": zero}

        micro = phase.micro_batch_size
        if micro in (None, "auto"):
            micro = self.train.micro_batch_size
        train = self.train.model_copy(update={"micro_batch_size": micro})

        config = self.model_copy(update={"train": train, "deepspeed": deepspeed})
        config._phase = phase
        return config

    def phase(self, name: str) -> PhaseConfig:
        """The phase ``name``. Raises ValueError for a phase that the method does not have."""
        for phase in self.phase_list:
            if phase.name == name:
                return phase
        raise ValueError(f"{name!r} is not a phase of this method; it has "
                         f"{', '.join(phase.name for phase in self.phase_list)}")

    def with_settings(self, name: str, settings: PhaseSettings) -> Config:
        """A copy in which phase ``name`` has these settings."""
        if isinstance(self.phases, PresetConfig):
            phases: Any = self.phases.model_copy(update={name: settings})
        else:
            changed = {key: getattr(settings, key) for key in PhaseSettings.model_fields}
            phases = tuple(
                phase.model_copy(update=changed) if phase.name == name else phase
                for phase in self.phases
            )
        return self.model_copy(update={"phases": phases})

    def with_kernel(self, mode: Mode) -> Config:
        """A copy in which the adapters of every phase use the kernel ``mode``."""
        if isinstance(self.phases, PresetConfig):
            return self.model_copy(update={"lora": self.lora.model_copy(update={"mode": mode})})

        def changed(phase: PhaseConfig) -> PhaseConfig:
            if not isinstance(phase.adapters, AdaptersConfig):
                return phase
            adapters = phase.adapters.model_copy(update={"mode": mode})
            return phase.model_copy(update={"adapters": adapters})

        return self.model_copy(update={"phases": tuple(map(changed, self.phases))})

    def with_phase_kernel(self, name: str, mode: Mode) -> Config:
        """A copy in which the adapters that train in phase ``name`` use the kernel ``mode``."""
        if isinstance(self.phases, PresetConfig):
            return self.with_kernel(mode)
        names = [phase.name for phase in self.phases]
        owner = max(i for i, phase in enumerate(self.phases[: names.index(name) + 1])
                    if isinstance(phase.adapters, AdaptersConfig))
        phases = list(self.phases)
        adapters = phases[owner].adapters
        assert isinstance(adapters, AdaptersConfig)
        phases[owner] = phases[owner].model_copy(update={"adapters": adapters.model_copy(update={"mode": mode})})
        return self.model_copy(update={"phases": tuple(phases)})

    @property
    def chooses_kernel(self) -> bool:
        """Whether the kernel of this phase's adapters is `auto`, and their kind and dropout leave a choice."""
        return self.adapters.mode == "auto" and not self.adapters.dropout and len(KINDS[self._kind()].can.kernels) > 1

    @property
    def adapters(self) -> AdaptersConfig:
        """How the adapters of this phase train. Only a config that `for_phase` returned has it."""
        assert self._phase is not None, "adapters belong to a phase"
        names = [phase.name for phase in self.phase_list]
        adapters = AdaptersConfig(rank=1)  # for a phase without any, where nothing reads the rank
        for phase in self.phase_list[: names.index(self._phase.name) + 1]:
            if isinstance(phase.adapters, AdaptersConfig):
                adapters = phase.adapters
        return adapters

    def _kind(self) -> str:
        """The kind of the adapters of this phase; that of LoRA if it has none."""
        kind = "lora"
        for phase in self.phase_list:
            if phase.new_adapters is not None:
                kind = phase.new_adapters.kind
            if self._phase is not None and phase.name == self._phase.name:
                break
        return kind

    @property
    def importance(self) -> Measured | None:
        """The importance of its adapters that this phase measures."""
        assert self._phase is not None, "importance belongs to a phase"
        return None if self._phase.active is None else self._phase.active.selection().measured

    def kernel(self, stage: int | None = None) -> str:
        """The kernel of a linear with an adapter in this phase at ZeRO ``stage`` (default: the phase's stage).

        ``auto`` follows a measurement on a CPU (benchmarks/lora_step.py): narrow blocks are dominated by
        kernel calls, of which ``merged`` has fewer; from a width of 768 on they differ by less than 4 %, and
        ``branch`` needs no fp32 copy of the weight. On a GPU a run replaces it before that (`run.autosize`). Only
        ``branch`` and ``peft`` support dropout, and only LoRA has more than one kernel.
        Only the first kernel of a kind computes with quantised weights.
        """
        mode: str = self.adapters.mode
        kernels = KINDS[self._kind()].can.kernels
        is_quantised = self._phase is not None and self._phase.base is not None
        if len(kernels) == 1 or is_quantised:
            return kernels[0]
        if stage is None:
            stage = self.zero.stage

        if mode == "auto":
            narrow = self.model.factory is None and self.model.hidden_size <= MERGED_MAX_WIDTH
            mode = "merged" if narrow and stage != 3 else "branch"

        if mode == "merged" and self.adapters.dropout:
            return "branch"
        return mode

    def runs_at(self, stage: int, plan: Plan) -> bool:
        """Whether the kernel of this phase can compute ``plan`` at ZeRO ``stage``.

        ``merged`` needs the weight of each frozen linear with an adapter complete on every rank, but
        stage 3 partitions it.
        """
        return not (stage == 3 and self.kernel(stage) == "merged" and plan.frozen_targets())

    @property
    def zero(self) -> ZeroSettings:
        """The parts of the DeepSpeed config that other modules use."""
        zero = self.deepspeed.get("zero_optimization", {})
        offload = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
        return self.zero_at(int(zero.get("stage", 0)), offload_optimizer=offload)

    def zero_at(self, stage: int, *, offload_optimizer: bool) -> ZeroSettings:
        """What `zero` would be with this stage and offload, and everything else as it is.

        By default gradients are reduced during the backward pass at stage 3, as DeepSpeed does, and at stage 2 unless
        the optimizer is offloaded or gradients are not contiguous: with either of these DeepSpeed 0.19 orders its
        streams in another way, which is not tested here.
        """
        zero = self.deepspeed.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size")
        overlaps = stage == 3 or (not offload_optimizer and bool(zero.get("contiguous_gradients", True)))
        return ZeroSettings(
            stage=stage,
            offload_optimizer=offload_optimizer,
            reduce_bucket_size=None if bucket is None else int(bucket),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold",
                                               ZeroSettings.persistence_threshold)),
            overlap_comm=stage >= 2 and bool(zero.get("overlap_comm", overlaps)),
            reduce_bytes=2 if self.train.reduce_dtype == "bf16" else 4,
        )

    @field_validator("lora", mode="before")
    @classmethod
    def _null_is_the_defaults(cls, value: Any) -> Any:
        """Let an override reset the whole section, as a list of phases requires it."""
        return LoraConfig() if value is None else value

    @model_validator(mode="after")
    def _method_can_be_run(self) -> Config:
        if isinstance(self.phases, PresetConfig):
            check_preset(self, self.phases)
        else:
            for section, default in (("convergence", None), ("lora", LoraConfig())):
                if getattr(self, section) != default:
                    raise FieldError(
                        section, "...",
                        "contains parameters of the preset prelora, but this recipe lists its phases",
                        f"move them there, and set {section}=null")
        try:
            check_method(self.phase_list)
        except FieldError as exc:
            field = f"phases.{exc.field}".rstrip(".")
            raise FieldError(field, exc.value, str(exc), exc.remedy) from exc
        check_sections(self)
        return self

    def adapters_key(self, phase: str, key: str) -> str:
        """The dotted name in this recipe of a ``key`` of the adapters of ``phase``."""
        if isinstance(self.phases, PresetConfig):
            return f"lora.{key}"
        return f"phases.{phase}.adapters.{key}"

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises ValueError when the global batch size is not a multiple of
        ``micro_batch_size * world_size``, when Mixup or CutMix is on and the micro-batch size is odd,
        or when ZeRO stage 0, which accumulates only in BF16, would have to accumulate.
        """
        per_pass = self.train.micro_batch_size * world_size
        if self.train.global_batch_size % per_pass:
            raise ValueError(f"train.global_batch_size {self.train.global_batch_size} is not divisible by "
                             f"train.micro_batch_size {self.train.micro_batch_size} x {world_size} ranks = {per_pass}")
        if self.data.mixes and self.train.micro_batch_size % 2:
            raise ValueError(f"train.micro_batch_size {self.train.micro_batch_size} is odd, but Mixup and CutMix "
                             "mix pairs; data.mixup=0 data.cutmix=0 disables them")
        accum = self.train.global_batch_size // per_pass
        if accum > 1 and self.zero.stage == 0:
            raise ValueError(f"ZeRO stage 0 accumulates gradients in BF16, and {accum} micro-batches per step would "
                             "lose precision; DeepSpeed has no fp32 accumulator there")
        return accum
