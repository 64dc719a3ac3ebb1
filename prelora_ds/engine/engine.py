"""One DeepSpeed engine under one plan: its optimizer steps, and what they report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from deepspeed import comm
from deepspeed.utils import get_z3_leaf_modules
from torch import nn

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.core.pruning import Cut
from prelora_ds.core.selection import Measured
from prelora_ds.data.batch import MicroBatch, mix_images, mix_labels
from prelora_ds.data.transforms import to_float
from prelora_ds.engine.active import apply_active, check_active
from prelora_ds.engine.boundary import seeded
from prelora_ds.engine.importance import importance_of, measure_outputs, parts_of_importance
from prelora_ds.engine.optimizer import inner_optimizer
from prelora_ds.engine.pruning import prepare, prune
from prelora_ds.engine.runtime import synchronize
from prelora_ds.engine.skip_update import skipping_update
from prelora_ds.engine.state import Slice
from prelora_ds.engine.stopwatch import Stopwatch
from prelora_ds.engine.transfer import Arriving, to_device, values_on
from prelora_ds.model.adapters import refresh_adapters
from prelora_ds.model.families import MakeModule
from prelora_ds.model.losses import classification_loss, count_right
from prelora_ds.model.vit import logits_of


@dataclass(frozen=True)
class Counters:
    """DeepSpeed's step counters, carried from engine to engine."""

    global_steps: int = 0
    global_samples: int = 0
    micro_steps: int = 0
    skipped_steps: int = 0


NO_STEPS = Counters()


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, reduced over ranks.

    loss: the mean over the global batch.
    grad_norm: the global gradient norm before clipping; NaN if DeepSpeed did not compute it.
    skipped: whether the update was skipped.
    corrupt: the number of unreadable samples in the global batch.
    top1, top5, judged: of the ``judged`` samples, how many had their label as the largest logit, and how many among
        the largest 5. Mixed images have no single label and are not judged.
    flags: for each flag, how many ranks raised it.
    forward_s: per rank, the seconds spent in forward passes of the step before, because those of this step are not
        over when they are sent; 0 in the first step of an engine.
    data_s: per rank, the seconds spent waiting for data.
    step_s: this rank's seconds from the first forward pass to the end of the update, without what the caller did in
        between.
    importance: adapter -> its importance in this step, if it is measured (`Engine.measure`).
    remaining: adapter -> how many of its components remain, if the update pruned them.
    """

    loss: float
    grad_norm: float
    skipped: bool
    corrupt: int = 0
    top1: int = 0
    top5: int = 0
    judged: int = 0
    flags: tuple[int, ...] = ()
    forward_s: tuple[float, ...] = ()
    data_s: tuple[float, ...] = ()
    step_s: float = 0.0
    importance: Mapping[str, float] = field(default_factory=dict)
    remaining: Mapping[str, int] = field(default_factory=dict)


class Engine:
    """One DeepSpeed engine under one plan. A training step does not depend on the phase.

    run_config: the config of the run.
    config: the config in effect in the plan's phase (`Config.for_phase`).
    ds: the DeepSpeed engine; None after a release.
    parked: this rank's fp32 slices, on the host, of frozen parameters that a later phase trains
        again, that are merged into, or that the engine has quantised.
    make_module: see `build_engine`.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        layout: Layout,
        num_labels: int,
        ds: Any,
        parked: Mapping[str, Slice],
        make_module: MakeModule | None = None,
    ) -> None:
        self.run_config = config
        self.config = config.for_phase(plan.phase)
        self.plan = plan
        self.layout = layout
        self.num_labels = num_labels
        self.ds = ds
        self.parked = parked
        self.make_module = make_module

        self._losses: list[torch.Tensor] = []  # of the micro-batches since the last update
        self._figures: Arriving | None = None  # of the step whose backward passes have begun
        self._forward = Stopwatch()
        self._begun = 0.0
        self._importance: Measured | None = None
        self._remaining: dict[str, int] = {}  # after the last update, if it pruned components

    @property
    def module(self) -> nn.Module:
        """The module with its adapters."""
        module: nn.Module = self.ds.module
        return module

    def counters(self) -> Counters:
        """Return DeepSpeed's step counters."""
        return Counters(**{name: getattr(self.ds, name) for name in Counters.__dataclass_fields__})

    def train_step(self, micro_batches: Sequence[MicroBatch], *, lr: float) -> StepStats:
        """Take one optimizer step over this rank's micro-batches. Collective."""
        self.backward(micro_batches)
        return self.finish_step(lr=lr)

    def backward(self, micro_batches: Sequence[MicroBatch], *, flags: Sequence[bool] = (),
                 data_s: float = 0.0) -> None:
        """Run forward and backward over all micro-batches. Collective.

        flags: this rank's flags. They are reduced together with the loss and so cost no extra
            collective.
        data_s: this rank's seconds of waiting for data, reduced likewise.

        Gradients are accumulated in fp32 at stages 1 to 3, and reduced in `train.reduce_dtype`. Raises ValueError if
        the number of micro-batches is not the engine's gradient accumulation.
        """
        self._begun = time.perf_counter()
        if len(micro_batches) != self.accumulation:
            raise ValueError(
                f"got {len(micro_batches)} micro-batches, expected {self.accumulation} (gradient accumulation)"
            )

        seconds = (self._forward.read(), data_s)
        corrupt = sum(len(batch.faults) for batch in micro_batches)
        judged = torch.zeros(3, device=self.ds.device)  # right labels, among the first 5, and all
        for number, batch in enumerate(micro_batches, start=1):
            targets = to_device(batch.labels, self.ds.device)
            with self._forward.running():
                logits = logits_of(self.ds(self.prepare(batch.images, batch.mix))).float()
            if batch.mix is None:
                judged += count_right(logits.detach(), targets)
            else:
                targets = mix_labels(targets, to_device(batch.mix, self.ds.device), logits.shape[-1])
            loss = classification_loss(
                logits,
                targets,
                kind=self.config.train.loss,
                label_smoothing=self.config.train.label_smoothing,
            )
            if number == len(micro_batches):
                # Before the last backward pass: when `finish_step` reads them they have long arrived.
                losses = torch.stack([*self._losses, _detached(loss)])
                self._figures = self._reduced([losses.mean(), judged], [corrupt, *flags], seconds)
            self.backward_of(loss)

    @property
    def accumulation(self) -> int:
        """How many micro-batches of this rank make an optimizer step."""
        return int(self.ds.gradient_accumulation_steps())

    @property
    def micro_batches_done(self) -> int:
        """How many micro-batches of the next optimizer step have had their backward pass."""
        return len(self._losses)

    def backward_of(self, loss: torch.Tensor) -> None:
        """Run the backward pass of one micro-batch. Collective. loss: its mean loss, a scalar."""
        self.ds.backward(loss)
        self._count(loss)

    def backward_from(self, outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor],
                      loss: torch.Tensor) -> None:
        """Run the backward pass of one micro-batch from the gradients of its outputs. Collective.

        gradients: those of the mean loss divided by `accumulation`.
        loss: the mean loss, a scalar.
        """
        self.ds.backward(seeded(outputs, gradients), scale_wrt_gas=False)
        self._count(loss)

    def _count(self, loss: torch.Tensor) -> None:
        self._losses.append(_detached(loss))
        if len(self._losses) < self.accumulation:
            # Before the last micro-batch this only counts; `update` takes the real step.
            self.ds.step()

    def mean_loss(self) -> torch.Tensor:
        """Return the mean loss of this rank's micro-batches since the last optimizer step, a scalar on the device."""
        return torch.stack(self._losses).mean()

    def _reduced(self, on_device: Sequence[torch.Tensor], counts: Sequence[float],
                 seconds: Sequence[float]) -> Arriving:
        """Send the figures of a step, summed over ranks in one all-reduce. Collective.

        Each rank fills its own column of the ``seconds``.
        """
        ranks = range(comm.get_world_size())
        columns = [each if rank == comm.get_rank() else 0.0 for each in seconds for rank in ranks]
        joined = _joined([*on_device, values_on(self.ds.device, [*counts, *columns])])
        return Arriving(joined, comm.all_reduce(joined, async_op=True))

    def finish_step(
        self,
        *,
        lr: float,
        accept: Callable[[float], bool] = lambda loss: True,
        adapter_lr: Mapping[str, float] = MappingProxyType({}),
        cut: Cut | None = None,
        away_s: float = 0.0,
    ) -> StepStats:
        """Take the optimizer step that follows `backward`. Collective.

        lr: the learning rate; each optimizer group uses it times the group's own scale.
        accept: called with the loss; if it returns False, the update is skipped.
        adapter_lr: adapter -> the learning rate that it has in place of ``lr``.
        cut: what the update does to the components of adapters that are pruned.
        away_s: seconds since the step began that the caller has spent on something else.

        The host waits twice: for the loss, which decides whether the update is made, and for the gradient norm, which
        decides whether the run goes on. At stage 3 it also waits for everything else: DeepSpeed 0.19 gathers the
        weights of the next step on a stream that does not wait for the optimizer's.
        """
        assert self._figures is not None, "backward comes first"
        world = comm.get_world_size()
        # They were measured in fp32.
        total, top1, top5, judged, corrupt, *rest = self._figures.read().float().tolist()
        raised, seconds = rest[: len(rest) - 2 * world], tuple(rest[len(rest) - 2 * world :])
        self._figures = None
        loss = total / world
        importance = self.take_importance()

        skipped = self.update(lr=lr, adapter_lr=adapter_lr, cut=cut, accepted=accept(loss))
        norm = self.ds.get_global_grad_norm()
        if self.config.zero.stage == 3:
            synchronize()
        grad_norm = float("nan") if norm is None else float(norm)
        return StepStats(
            loss=loss,
            grad_norm=grad_norm,
            skipped=skipped,
            corrupt=int(corrupt),
            top1=int(top1),
            top5=int(top5),
            judged=int(judged),
            flags=tuple(map(int, raised)),
            forward_s=seconds[:world],
            data_s=seconds[world:],
            step_s=time.perf_counter() - self._begun - away_s,
            importance=importance,
            remaining=self._remaining,
        )

    def update(self, *, lr: float, adapter_lr: Mapping[str, float] = MappingProxyType({}), cut: Cut | None = None,
               accepted: bool = True) -> bool:
        """Take the optimizer step that follows the backward passes, or skip it, and reduce nothing else. Collective.

        lr, adapter_lr, cut: as in `finish_step`.

        Returns whether the update was skipped.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        inner_optimizer(self.ds).own_lr = self._by_name(adapter_lr)
        prepare(self, cut)

        skipped_before = self.ds.skipped_steps
        with contextlib.nullcontext() if accepted else skipping_update(self.ds.optimizer):
            self.ds.step()
        skipped = bool(self.ds.skipped_steps > skipped_before)
        self._remaining = {}
        if cut is not None and cut.keep is not None and not skipped:
            self._remaining = prune(self, cut.keep)
        refresh_adapters(self.module)
        self._losses = []
        return skipped

    def take_importance(self) -> dict[str, float]:
        """Return the importance of each adapter in this step; {} if none is measured. Collective if it is.

        Call it between the backward passes and `update`; `finish_step` does so itself.
        """
        parts = parts_of_importance(self, self._importance)
        sums = self.summed(list(parts.values())).tolist() if parts else []
        return importance_of(self._importance, dict(zip(parts, sums, strict=True)))

    def summed(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sums over ranks of ``values`` on the device, flattened and joined, in fp64. Collective."""
        joined = _joined(values)
        comm.all_reduce(joined)
        return joined

    def measure(self, importance: Measured | None) -> None:
        """Measure this importance of each adapter from the next step on, or none (`StepStats.importance`)."""
        self._importance = importance
        measure_outputs(self.module, on=importance == "forward")

    def _by_name(self, of_adapters: Mapping[str, float]) -> dict[str, float]:
        """Return parameter -> the value of its adapter, for the adapters in ``of_adapters``."""
        if not of_adapters:
            return {}
        leaves = self.plan.leaves(self.layout)
        return {name: of_adapters[path] for name, (path, _) in leaves.items() if path in of_adapters}

    def set_active(self, names: Iterable[str]) -> None:
        """Train only ``names`` from the next step on. Collective; call it between two steps.

        ``names`` are chosen among the parameters that the plan trains. The others get no gradient,
        and their weights, fp32 masters, moments and Adam steps stay bitwise unchanged. An inactive
        adapter still adds its branch.

        Raises ValueError on every rank, before anything is changed, for a name that the plan does
        not train, for an empty set, for sets that differ between ranks, and if stage 3 gathers
        blocks as units (`build.units_of`), as in a phase without `active`.
        """
        chosen = frozenset(names)
        check_active(self.plan, chosen)
        if chosen != self.plan.trainable and get_z3_leaf_modules(self.ds.module):
            raise ValueError(f"phase {self.plan.phase}: at ZeRO stage 3 only a phase with `active` can choose what "
                             "trains; add `active` to it in the recipe")
        self.plan = replace(self.plan, active=None if chosen == self.plan.trainable else chosen)
        apply_active(self.ds, self.plan, self.layout)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield a function from uint8 images [B, C, H, W] to fp32 logits [B, labels].

        Within the context the module is in evaluation mode, and no gradients are computed.
        """
        with self.inference():
            yield lambda images: logits_of(self.ds(self.prepare(images))).float()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Within the context the module is in evaluation mode, and no gradients are computed."""
        self.ds.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ds.train()
            if self.config.zero.stage == 3:
                # A forward pass without backward leaves parameters gathered at stage 3 (DeepSpeed
                # 0.19), and gathering them again would fail.
                self.ds.empty_partition_cache()

    def prepare(self, images: torch.Tensor, mix: torch.Tensor | None = None) -> torch.Tensor:
        """Return uint8 images [B, C, H, W] on the host as BF16 in [-1, 1] on the device.

        With ``mix``, pairs of images are first mixed in fp32 (`prelora_ds.data.batch.mix_images`).
        """
        images = to_device(images, self.ds.device)
        if mix is None:
            return to_float(images, torch.bfloat16)
        return mix_images(to_float(images, torch.float32), to_device(mix, self.ds.device)).to(torch.bfloat16)


def _joined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return ``values``, flattened and joined, in fp64."""
    return torch.cat([value.double().view(-1) for value in values])


def _detached(loss: torch.Tensor) -> torch.Tensor:
    """Return the value of ``loss`` as an fp32 scalar on the device."""
    return loss.detach().float().view(())
