"""AdamW with one Adam step per parameter name, over ranges of DeepSpeed's flat tensors.

DeepSpeed packs the parameters of a group into flat fp32 tensors, and its inner optimizer sees only
these: torch's AdamW and DeepSpeedCPUAdam keep one Adam step per flat tensor and update all of it.
The two optimizers here know which range of a flat tensor belongs to which name. Each name has its
own Adam step, and the range of an inactive name is not updated: its weight, fp32 master, moments
and step stay bitwise unchanged.

Therefore parameters with different steps can share a group. One group per step would cost DeepSpeed
one or two collectives per group and step at stages 1 to 3, and padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn
from torch.optim.adamw import adamw

from prelora_ds.config.tree import Config
from prelora_ds.core.layout import Layout
from prelora_ds.core.plan import Plan
from prelora_ds.engine.fragments import Fragment, fragments, trained_names
from prelora_ds.engine.runtime import device
from prelora_ds.engine.transfer import values_on
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
# What else a step keeps of parameters whose components are pruned (AdaLoRA).
SENSITIVITY = ("sensitivity", "uncertainty")
KEPT = (*MOMENTS, *SENSITIVITY)


def make_optimizer(config: Config, plan: Plan, layout: Layout, module: nn.Module) -> AdamByName:
    """Create the optimizer of ``plan``, which `bind_names` completes.

    There is one group per (weight decay, scale of the learning rate, adapter or not), because these
    apply to a whole flat tensor. Groups and parameters are in the order of ``module``. Of the base
    parameters only matrices decay; adapters have their own weight decay.
    """
    settings = config.optimizer
    adapters_decay = config.adapters.weight_decay
    scales = plan.rate_scales(layout)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, p in named_parameters(module).items():
        if name not in plan.trainable:
            continue
        is_adapter = name not in layout.parameters
        decay = adapters_decay if is_adapter else settings.weight_decay * _is_matrix(name, layout)
        groups.setdefault((decay, scales[name], is_adapter), []).append(p)
    param_groups = [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale, _), params in groups.items()
    ]

    on_cpu = config.zero.offload_optimizer and config.deepspeed.get(
        "zero_force_ds_cpu_optimizer", True
    )
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if on_cpu:
        return CPUAdamByName(param_groups, **common)
    # On a GPU the fused kernel reads and writes everything once; torch's default there makes a pass for each operation.
    return TorchAdamByName(param_groups, **common, fused=True if device().type == "cuda" else None)


def _is_matrix(name: str, layout: Layout) -> bool:
    """Return whether ``name`` is the weight of a linear or a convolution.

    Biases, norms, the class token and position embeddings are not.
    """
    return name.endswith(".weight") and len(layout.parameters[name]) >= 2


def inner_optimizer(engine: DeepSpeedEngine) -> AdamByName:
    """Return the optimizer of `make_optimizer` from inside DeepSpeed's wrapper."""
    inner: AdamByName = engine.optimizer.optimizer
    return inner


def bind_names(engine: DeepSpeedEngine, measured: frozenset[str]) -> None:
    """Bind the names of a new engine's parameters to ranges, with all Adam steps at 0.

    measured: as in `AdamByName`.
    """
    inner = inner_optimizer(engine)
    inner.bind(trained_names(engine), fragments(engine))
    inner.measured = measured


@dataclass
class _Flat:
    """The names in a flat tensor, and a cache of its views.

    names: all parameters of its group, including those that lie entirely on other ranks.
    ranges: (name, start, stop) of this rank's parts, in the order of memory.
    spans, addresses, views: the cache. ``views`` are those of the weights and of both moments at
        ``spans``, valid while these tensors are at ``addresses``.
    """

    names: Sequence[str]
    ranges: list[tuple[str, int, int]]
    spans: list[tuple[int, int]] = field(default_factory=list)
    addresses: tuple[int, ...] = ()
    views: tuple[list[torch.Tensor], ...] = ()


@dataclass
class StepRanges:
    """The ranges that one group updates in a step.

    The four lists of tensors correspond to each other, ``steps`` holds the Adam step of each range,
    and ``rates`` its learning rate.
    """

    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class AdamByName(torch.optim.Optimizer):
    """The common part of the two optimizers.

    Until `bind` is called, a step is that of the parent class: DeepSpeed 0.19 takes one step at
    stage 0 during initialization.

    steps: name -> number of Adam steps taken, for all trainable names; the same on every rank. A
        step advances the count of all active names, whichever rank holds them. When DeepSpeed skips
        an update, it does not call `step`.
    active: the names to update, or None for all.
    own_lr: name -> the learning rate, before the scale of its group, of names that do not have the
        group's.
    measured: the names whose state also has the `SENSITIVITY` of each element (AdaLoRA). They do
        not share a flat tensor with others.
    sensitivity_betas: the decay of these averages in the next steps, or None to leave them.
    stay_zero: the names of which those elements of the masters stay zero that are zero.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: dict[str, int] = {}
        self.active: frozenset[str] | None = None
        self.own_lr: Mapping[str, float] = {}
        self.measured: frozenset[str] = frozenset()
        self.sensitivity_betas: tuple[float, float] | None = None
        self.stay_zero: frozenset[str] = frozenset()
        self._flats: dict[torch.Tensor, _Flat] = {}

    def bind(
        self, flats: Iterable[tuple[torch.Tensor, Sequence[str]]], parts: Iterable[Fragment]
    ) -> None:
        """Set which range of which flat tensor belongs to which name, with all steps at 0.

        flats: each flat tensor with the names of its group.
        parts: the position of this rank's fragments in them.
        """
        self._flats = {flat: _Flat(names, []) for flat, names in flats}
        self.steps = {name: 0 for flat in self._flats.values() for name in flat.names}
        self.active = None
        for part in sorted(parts, key=lambda part: part.offset):
            stop = part.offset + part.stop - part.start
            self._flats[part.flat].ranges.append((part.name, part.offset, stop))

        for tensor, flat in self._flats.items():
            # Padding belongs to the range before it. It is zero and stays zero. But kernels compute
            # the last elements of a tensor differently from the others, so with all names active
            # the range must end where the parent's does, for bitwise equal results.
            starts = [start for _, start, _ in flat.ranges]
            stops = [*starts[1:], tensor.numel()][: len(starts)]  # [] if this rank has only padding
            flat.ranges = [
                (name, start, stop)
                for (name, *_), start, stop in zip(flat.ranges, starts, stops, strict=True)
            ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed passes none
        """Take one AdamW step on the ranges of all active names."""
        if not self._flats:
            super().step(closure)
            return

        for group in self.param_groups:
            ranges = StepRanges()
            for tensor in group["params"]:
                self._add_ranges(ranges, tensor, group)
                self._measure(tensor)
            zeros = [zero for tensor in group["params"] for zero in self._zeros(tensor)]
            if ranges.steps:
                self.update(group, ranges)
            for part, is_zero in zeros:
                part.masked_fill_(is_zero, 0.0)

    def keys_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the keys of the state of a flat tensor with these names, or of one of the names."""
        return KEPT if self.measured and not self.measured.isdisjoint(names) else MOMENTS

    def _measure(self, tensor: torch.Tensor) -> None:
        """Average the sensitivity of each element and its uncertainty (Zhang et al. 2023, equations 8 to 10).

        The gradient is that of the update, which may have been clipped.
        """
        if self.sensitivity_betas is None or self.measured.isdisjoint(self._flats[tensor].names):
            return
        assert tensor.grad is not None
        beta1, beta2 = self.sensitivity_betas
        sensitivity, uncertainty = (self.state[tensor][key] for key in SENSITIVITY)
        now = (tensor.detach() * tensor.grad).abs_()
        sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
        uncertainty.mul_(beta2).add_(now.sub_(sensitivity).abs_(), alpha=1 - beta2)

    def _zeros(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each part of ``tensor`` in which zeros stay, with where they are."""
        for name, start, stop in self._flats[tensor].ranges if self.stay_zero else ():
            if name in self.stay_zero:
                part = tensor.detach().view(-1)[start:stop]
                yield part, part == 0

    def _add_ranges(
        self, ranges: StepRanges, tensor: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        """Advance the steps of the active names in ``tensor``, and add its ranges to ``ranges``."""
        flat = self._flats[tensor]
        active = self.active
        for name in flat.names:
            if active is None or name in active:
                self.steps[name] += 1

        # Neighbours with equal steps and rates form one span.
        spans: list[tuple[int, int]] = []
        settings: list[tuple[int, float]] = []
        for name, start, stop in flat.ranges:
            if active is not None and name not in active:
                continue
            own = self.own_lr.get(name)
            rate = group["lr"] if own is None else own * group["lr_scale"]
            setting = (self.steps[name], rate)
            if settings and settings[-1] == setting and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
                settings.append(setting)

        state = self.state[tensor]
        # Every rank creates the moments, whether or not it holds an active name, because an export
        # states which names have moments.
        for key in self.keys_of(flat.names):
            if key not in state:
                state[key] = torch.zeros_like(tensor.detach())
        stepped = (tensor.detach(), *(state[key] for key in MOMENTS))
        addresses = tuple(t.data_ptr() for t in stepped)
        if (spans, addresses) != (flat.spans, flat.addresses):
            flat.spans, flat.addresses = spans, addresses
            flat.views = tuple([t.view(-1)[start:stop] for start, stop in spans] for t in stepped)

        assert tensor.grad is not None  # DeepSpeed sets the gradient of every flat tensor
        gradient = tensor.grad.reshape(-1)
        ranges.grads += [gradient[start:stop] for start, stop in spans]
        ranges.steps += [step for step, _ in settings]
        ranges.rates += [rate for _, rate in settings]
        lists = (ranges.weights, ranges.exp_avgs, ranges.exp_avg_sqs)
        for views, cached in zip(lists, flat.views, strict=True):
            views += cached

    def update(self, group: Mapping[str, Any], ranges: StepRanges) -> None:
        """Update ``ranges`` in place, with the settings of ``group``."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the parent's state, with a "step" per flat tensor: the largest of its names.

        Optimizers that read DeepSpeed's own checkpoints expect this key.
        """
        for tensor, flat in self._flats.items():
            if tensor in self.state:
                step = max(self.steps[name] for name in flat.names)
                # torch's AdamW keeps the step in a tensor, DeepSpeedCPUAdam in an int.
                counts_in_tensor = isinstance(self, torch.optim.AdamW)
                self.state[tensor]["step"] = torch.tensor(float(step)) if counts_in_tensor else step
        return super().state_dict()


class TorchAdamByName(AdamByName, torch.optim.AdamW):
    """The optimizer that updates with torch's functional AdamW, on the tensors' device."""

    def update(self, group: Mapping[str, Any], ranges: StepRanges) -> None:
        beta1, beta2 = group["betas"]
        for rate in dict.fromkeys(ranges.rates):
            of_rate = [i for i, other in enumerate(ranges.rates) if other == rate]
            # The fused kernel reads the steps on the device of the weights, the others read them on the host.
            where = ranges.weights[0].device if group["fused"] else torch.device("cpu")
            steps = values_on(where, [ranges.steps[i] for i in of_rate], torch.float32)
            adamw(
                [ranges.weights[i] for i in of_rate],
                [ranges.grads[i] for i in of_rate],
                [ranges.exp_avgs[i] for i in of_rate],
                [ranges.exp_avg_sqs[i] for i in of_rate],
                [],
                list((steps - 1).unbind()),  # adamw adds 1
                foreach=group["foreach"],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


class CPUAdamByName(AdamByName, DeepSpeedCPUAdam):  # type: ignore[misc]  # it is not annotated
    """The optimizer that updates with the CPU kernel of DeepSpeed 0.19's DeepSpeedCPUAdam.

    The kernel (ops/adam/cpu_adam.py, ds_opt_adam.adam_update) takes the Adam step as an argument.
    """

    def update(self, group: Mapping[str, Any], ranges: StepRanges) -> None:
        beta1, beta2 = group["betas"]
        for weight, grad, exp_avg, exp_avg_sq, step, rate in zip(
            ranges.weights,
            ranges.grads,
            ranges.exp_avgs,
            ranges.exp_avg_sqs,
            ranges.steps,
            ranges.rates,
            strict=True,
        ):
            self.ds_opt_adam.adam_update(
                self.opt_id,
                step,
                rate,
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                group["bias_correction"],
                weight,
                grad,
                exp_avg,
                exp_avg_sq,
            )
