"""A DeepSpeed engine from a plan: `build_engine(config, plan, state)`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import logger, set_z3_leaf_modules
from torch import nn

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.data.batch import MicroBatch, mix_images, mix_labels
from prelora_ds.data.transforms import to_float
from prelora_ds.engine.active import apply_active, check_active
from prelora_ds.engine.leave_out import update_left_out
from prelora_ds.engine.optimizer import bind_names, make_optimizer
from prelora_ds.engine.runtime import device, synchronize
from prelora_ds.engine.state import EngineState, Slice, restore_state
from prelora_ds.engine.stopwatch import Stopwatch
from prelora_ds.model.adapters import attach_adapters, check_adapters, check_names
from prelora_ds.model.adapters.lora import lora_linears, merge_bases
from prelora_ds.model.families import named_parameters
from prelora_ds.model.losses import classification_loss
from prelora_ds.model.vit import build_model, compile_blocks, logits_of


@dataclass(frozen=True)
class Counters:
    """What DeepSpeed counts in an engine and we carry from one to the next."""

    global_steps: int = 0
    global_samples: int = 0
    micro_steps: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, reduced over ranks. loss: mean over the global batch; grad_norm: before clipping; skipped:
    the update was left out; corrupt: samples that could not be read; flags: how many ranks raised each; forward_s,
    data_s: seconds of each rank, forward passes and waiting for data; step_s: seconds of this rank from the first
    forward pass to the end of the update."""

    loss: float
    grad_norm: float
    skipped: bool
    corrupt: int = 0
    flags: tuple[int, ...] = ()
    forward_s: tuple[float, ...] = ()
    data_s: tuple[float, ...] = ()
    step_s: float = 0.0


class Engine:
    """One DeepSpeed engine under one plan. The step knows no phase.

    run_config: of the whole run. config: the same with the settings of the plan's phase.
    parked: this rank's fp32 slices, on the host, of frozen parameters that a later phase trains again.
    """

    def __init__(self, config: Config, plan: Plan, layout: Layout, num_labels: int, ds: Any,
                 parked: Mapping[str, Slice]) -> None:
        self.run_config, self.config = config, config.for_phase(plan.phase)
        self.plan, self.layout, self.num_labels, self.ds = plan, layout, num_labels, ds
        self.parked = parked
        self._sums, self._forward, self._begun = torch.zeros(2), Stopwatch(), 0.0

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.ds.module
        return module

    def counters(self) -> Counters:
        return Counters(**{name: getattr(self.ds, name) for name in Counters.__dataclass_fields__})

    def train_step(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> StepStats:
        """One optimizer step over this rank's micro-batches. Collective."""
        self.backward(micro_batches)
        return self.finish_step(lr=lr)

    def backward(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forward and backward of all micro-batches; gradients are accumulated and reduced in fp32 (stages 1 to 3).

        Raises ValueError when their number is not the engine's accumulation.
        """
        self._begun = time.perf_counter()
        if len(micro_batches) != self.ds.gradient_accumulation_steps():
            raise ValueError(f"{len(micro_batches)} micro-batches for {self.ds.gradient_accumulation_steps()} steps "
                             "of accumulation")
        self.ds.train()
        losses: list[torch.Tensor] = []
        for batch in micro_batches:
            if losses:
                self.ds.step()  # only counts the micro-step; the last one is taken in finish_step
            with self._forward.running():
                logits = logits_of(self.ds(self.prepare(batch.images, batch.mix))).float()
            targets = batch.labels.to(self.ds.device)
            if batch.mix is not None:
                targets = mix_labels(targets, batch.mix, logits.shape[-1])
            loss = classification_loss(logits, targets, kind=self.config.train.loss,
                                       label_smoothing=self.config.train.label_smoothing)
            self.ds.backward(loss)
            losses.append(loss.detach())
        corrupt = sum(len(batch.faults) for batch in micro_batches)
        self._sums = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(corrupt)])

    def finish_step(self, *, lr: float, flags: Sequence[bool] = (), data_s: float = 0.0,
                    accept: Callable[[float], bool] = lambda loss: True) -> StepStats:
        """The optimizer's part of a step, with each group's rate (``lr`` times its scale) written into it.

        flags, data_s: of this rank; they travel with the loss and cost no collective of their own. accept: an update
        whose loss it refuses is left out.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        world, own = comm.get_world_size(), torch.zeros(2, comm.get_world_size())
        own[:, comm.get_rank()] = torch.tensor([self._forward.read(), data_s])
        figures = torch.cat([torch.tensor(flags, dtype=own.dtype), own.flatten()]).to(self._sums.device)
        reduced = torch.cat([self._sums, figures])
        comm.all_reduce(reduced)
        total, corrupt, *rest = reduced.tolist()
        raised, seconds = rest[:len(flags)], tuple(rest[len(flags):])
        loss, skipped_before = total / world, self.ds.skipped_steps
        with contextlib.nullcontext() if accept(loss) else update_left_out(self.ds.optimizer):
            self.ds.step()
        merge_bases(self.module)
        norm = self.ds.get_global_grad_norm()
        synchronize()
        return StepStats(loss=loss, grad_norm=float("nan") if norm is None else float(norm),
                         skipped=self.ds.skipped_steps > skipped_before, corrupt=int(corrupt),
                         flags=tuple(map(int, raised)), forward_s=seconds[:world], data_s=seconds[world:],
                         step_s=time.perf_counter() - self._begun)

    def set_active(self, names: Iterable[str]) -> None:
        """Train only ``names``, of the parameters that the plan trains, from the next step until the next call.
        Collective; to be called between two steps.

        The others get no gradient, and their weights, fp32 masters, moments and Adam steps stay as they are, bit for
        bit. An adapter that is not named still adds its branch.

        Raises ValueError on every rank, before anything is changed: for a name that the plan does not train, without
        any name, and for other names on another rank.
        """
        chosen = frozenset(names)
        check_active(self.plan, chosen)
        self.plan = replace(self.plan, active=None if chosen == self.plan.trainable else chosen)
        apply_active(self.ds, self.plan, self.layout)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """A context whose value maps uint8 images [B,C,H,W] to fp32 logits [B, labels], without gradients."""
        self.ds.eval()
        try:
            with torch.no_grad():
                yield lambda images: logits_of(self.ds(self.prepare(images))).float()
        finally:
            self.ds.train()
            if self.config.zero.stage == 3:
                # A forward pass without backward leaves parameters gathered, and the next gathering would fail.
                self.ds.empty_partition_cache()

    def prepare(self, images: torch.Tensor, mix: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 [B,C,H,W] on the host -> bf16 in [-1, 1] on the device, pairs mixed by ``mix`` in fp32 before."""
        images = images.to(self.ds.device)
        if mix is None:
            return to_float(images, torch.bfloat16)
        return mix_images(to_float(images, torch.float32), mix).to(torch.bfloat16)


def build_engine(run_config: Config, plan: Plan, layout: Layout, num_labels: int, state: EngineState,
                 counters: Counters = Counters(), *, parked: frozenset[str] = frozenset()) -> Engine:
    """An engine for ``plan`` that holds ``state`` (consumed). Collective.

    parked: parameters whose fp32 values stay on the host where the plan freezes them (`Engine.parked`).

    The module is always a fresh one: DeepSpeed leaves hooks and attributes of a former engine on a module.
    """
    config = run_config.for_phase(plan.phase)
    ds_config = deepspeed_config(config, plan, layout, comm.get_world_size())
    with torch.random.fork_rng(devices=[]):
        module = empty_module(config, plan, layout, num_labels, ds_config)
    optimizer = make_optimizer(config, plan, layout, module)
    with _without_chatter():
        ds, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config, dist_init_required=False)
    check_adapters(ds.module, plan)
    bind_names(ds)
    kept = restore_state(ds, plan, layout, state, parked=parked - plan.trainable)
    apply_active(ds, plan, layout)
    for name, value in vars(counters).items():
        setattr(ds, name, value)
    # Engines begin between two steps, and DeepSpeed ends a step where this is a multiple of the accumulation, which
    # may be another one now: on other ranks, or with another micro-batch.
    ds.micro_steps -= ds.micro_steps % ds.gradient_accumulation_steps()
    return Engine(run_config, plan, layout, num_labels, ds, kept)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Without the lines that DeepSpeed 0.19 prints of its memory at stage 1, and its warning, at each start of an
    engine, of an optimizer that is not its own."""

    def is_news(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    logger.addFilter(is_news)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(is_news)


def deepspeed_config(config: Config, plan: Plan, layout: Layout, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of one phase: the user's ZeRO section, and what the recipe owns."""
    ds = copy.deepcopy(config.deepspeed)
    zero = ds.setdefault("zero_optimization", {})
    shapes = plan.parameters(layout)
    trained = sum(math.prod(shapes[name]) for name in plan.trainable)
    # A bucket never holds more than what trains; ZeRO-3 allocates it whole.
    zero["reduce_bucket_size"] = min(config.zero.reduce_bucket_size, trained)
    ds |= {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "bf16": {**ds.get("bf16", {}), "enabled": True},
        "communication_data_type": "fp32",  # DeepSpeed's default is bf16, here and for accumulation
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # DeepSpeed 0.19 knows optimizers by their exact class
    }
    if config.zero.stage > 0:  # stage 0 knows no other accumulator than BF16, and we refuse to accumulate there
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
    return ds


def empty_module(config: Config, plan: Plan, layout: Layout, num_labels: int,
                  ds_config: Mapping[str, Any]) -> nn.Module:
    """A bf16 module of zeros on the device, adapters attached, partitioned as it is made at stage 3."""
    with torch.device("meta"):
        module = build_model(config.model, num_labels)
    attach_adapters(module, plan, layout, dropout=config.adapters.dropout, kernel=config.adapters.mode)
    check_names(module, plan, layout)
    module.to(torch.bfloat16)
    shard = Init(module=nn.Module(), config_dict_or_path=dict(ds_config)) if config.zero.stage == 3 else None
    for submodule in module.modules():
        for key, p in submodule.named_parameters(recurse=False):
            zeros = nn.Parameter(torch.zeros_like(p, device=device()))
            setattr(submodule, key, zeros)
            if shard is not None:
                shard._convert_to_zero_parameters([zeros])
        for key, b in submodule.named_buffers(recurse=False):
            submodule.register_buffer(key, torch.zeros_like(b, device=device()),
                                      persistent=key not in submodule._non_persistent_buffers_set)
    for name, p in named_parameters(module).items():
        p.requires_grad_(name in plan.trainable)
    if config.kernel() == "merged":
        for linear in lora_linears(module):
            if not linear.get_base_layer().weight.requires_grad:
                linear.keep_base()
    if config.model.compile:
        blocks = [module.get_submodule(layout.block(layer).rstrip(".")) for layer in layout.layers()]
        if config.zero.stage == 3:
            # Gathered block by block: hooks on what is inside would break each block's graph.
            set_z3_leaf_modules(module, list({type(block) for block in blocks}))
        compile_blocks(blocks)
    return module
