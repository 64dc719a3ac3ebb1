"""AdamW with an Adam step for each parameter name, over ranges of DeepSpeed's flat tensors.

DeepSpeed packs a group's parameters into flat fp32 tensors, and those are all that its inner optimizer sees: torch's
AdamW and DeepSpeedCPUAdam give each of them one Adam step and move all of it. The two optimizers here know which range
of a flat tensor belongs to which name. Each name has an Adam step of its own, and a name that is not active is not a
range: its weight, fp32 master, moments and step stay as they are, bit for bit.

So parameters with different steps share a group. A group for each of them would cost DeepSpeed one or two collectives a
step at stages 1 to 3, and padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from prelora_ds.model.families import named_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(config: Config, plan: Plan, layout: Layout, module: nn.Module) -> AdamByName:
    """The optimizer of ``plan``, not bound yet, with one group per (decay, rate, adapter or not): what a flat tensor
    has in common. Groups and parameters are in the order of ``module``.

    Decay is for matrices of the base only, `weight_decay` of their own for adapters.
    """
    o, adapters = config.optimizer, config.adapters
    scales = plan.rate_scales(layout)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, p in named_parameters(module).items():
        if name not in plan.trainable:
            continue
        is_adapter = name not in layout.parameters
        decay = adapters.weight_decay if is_adapter else o.weight_decay * _is_matrix(name, layout)
        groups.setdefault((decay, scales[name], is_adapter), []).append(p)
    param_groups = [{"params": params, "weight_decay": decay, "lr_scale": scale}
                    for (decay, scale, _), params in groups.items()]
    on_cpu = config.zero.offload_optimizer and config.deepspeed.get("zero_force_ds_cpu_optimizer", True)
    return (CPUAdamByName if on_cpu else TorchAdamByName)(param_groups, lr=o.lr, betas=o.betas, eps=o.eps)


def _is_matrix(name: str, layout: Layout) -> bool:
    """Weights of linears and convolutions; not biases, norms, the class token or position embeddings."""
    return name.endswith(".weight") and len(layout.parameters[name]) >= 2


def inner_optimizer(engine: DeepSpeedEngine) -> AdamByName:
    """The optimizer of `make_optimizer` inside DeepSpeed's wrapper."""
    inner: AdamByName = engine.optimizer.optimizer
    return inner


def bind_names(engine: DeepSpeedEngine) -> None:
    """Tell the inner optimizer of a newly built engine which name lies where. All steps are 0 afterwards."""
    inner_optimizer(engine).bind(trained_names(engine), fragments(engine))


@dataclass
class _Flat:
    """What is known of a flat tensor.

    names: all parameters of its group, also those that lie with other ranks. ranges: (name, start, stop) of what lies
    with this rank, in the order of memory. The rest is a cache: the views of weights and of both moments at ``spans``,
    made of tensors at ``addresses``.
    """

    names: Sequence[str]
    ranges: list[tuple[str, int, int]]
    spans: list[tuple[int, int]] = field(default_factory=list)
    addresses: tuple[int, ...] = ()
    views: tuple[list[torch.Tensor], ...] = ()


@dataclass
class Runs:
    """What one group steps now: views of equal length in four lists, and the Adam step of each."""

    weights: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    exp_avgs: list[torch.Tensor] = field(default_factory=list)
    exp_avg_sqs: list[torch.Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class AdamByName(torch.optim.Optimizer):
    """What both forms have in common. Until `bind` is called, a step is that of the parent class: DeepSpeed 0.19 takes
    one at stage 0 while it initializes.

    steps: name -> Adam steps taken, for all names that train, the same on every rank. A step advances those of all
        active names, whichever rank holds them; an update that DeepSpeed leaves out does not call `step`.
    active: the names that are stepped, or None for all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: dict[str, int] = {}
        self.active: frozenset[str] | None = None
        self._flats: dict[torch.Tensor, _Flat] = {}

    def bind(self, flats: Iterable[tuple[torch.Tensor, Sequence[str]]], parts: Iterable[Fragment]) -> None:
        """``flats``: each flat tensor with the names of its group, ``parts``: where this rank's lie in them."""
        self._flats = {flat: _Flat(names, []) for flat, names in flats}
        self.steps, self.active = {name: 0 for flat in self._flats.values() for name in flat.names}, None
        for part in sorted(parts, key=lambda part: part.offset):
            self._flats[part.flat].ranges.append((part.name, part.offset, part.offset + part.stop - part.start))
        for tensor, flat in self._flats.items():
            # Padding goes with the name before it. It is zero and stays so; but kernels compute the last elements of
            # a tensor in another way than those before, so a step with all names active shall end where the parent's
            # does.
            starts = [start for _, start, _ in flat.ranges]
            stops = [*starts[1:], tensor.numel()][: len(starts)]  # none, where this rank holds nothing but padding
            flat.ranges = [(name, start, stop) for (name, *_), start, stop
                           in zip(flat.ranges, starts, stops, strict=True)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # DeepSpeed calls it without a closure
        """One AdamW step of all active names in the groups' flat tensors."""
        if not self._flats:
            super().step(closure)
            return
        for group in self.param_groups:
            runs = Runs()
            for tensor in group["params"]:
                self._add_runs(runs, tensor)
            if runs.steps:
                self.update(group, runs)

    def _add_runs(self, runs: Runs, tensor: torch.Tensor) -> None:
        flat, active = self._flats[tensor], self.active
        for name in flat.names:
            if active is None or name in active:
                self.steps[name] += 1

        spans: list[tuple[int, int]] = []
        steps: list[int] = []
        for name, start, stop in flat.ranges:
            if active is not None and name not in active:
                continue
            if steps and steps[-1] == self.steps[name] and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
                steps.append(self.steps[name])

        state = self.state[tensor]
        for key in MOMENTS:  # on every rank alike, whichever holds what is active: an export says which names have any
            if key not in state:
                state[key] = torch.zeros_like(tensor.detach())
        stepped = (tensor.detach(), *(state[key] for key in MOMENTS))
        addresses = tuple(t.data_ptr() for t in stepped)
        if (spans, addresses) != (flat.spans, flat.addresses):
            flat.spans, flat.addresses = spans, addresses
            flat.views = tuple([t.view(-1)[start:stop] for start, stop in spans] for t in stepped)

        gradient = tensor.grad.reshape(-1)  # type: ignore[union-attr]  # DeepSpeed gives each flat tensor one
        runs.grads += [gradient[start:stop] for start, stop in spans]
        runs.steps += steps
        for total, views in zip((runs.weights, runs.exp_avgs, runs.exp_avg_sqs), flat.views, strict=True):
            total += views

    def update(self, group: Mapping[str, Any], runs: Runs) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The parent's, with the "step" that optimizers which read DeepSpeed's own checkpoints expect: the largest of
        the names in a flat tensor."""
        for tensor, flat in self._flats.items():
            if tensor in self.state:
                step = max(self.steps[name] for name in flat.names)
                # torch's AdamW counts in a tensor, DeepSpeedCPUAdam in an int.
                counts_in_tensor = isinstance(self, torch.optim.AdamW)
                self.state[tensor]["step"] = torch.tensor(float(step)) if counts_in_tensor else step
        return super().state_dict()


class TorchAdamByName(AdamByName, torch.optim.AdamW):
    """By torch's functional AdamW, on the tensors' device."""

    def update(self, group: Mapping[str, Any], runs: Runs) -> None:
        beta1, beta2 = group["betas"]
        before = (torch.tensor(runs.steps, dtype=torch.float32) - 1).unbind()  # adamw itself adds 1
        adamw(runs.weights, runs.grads, runs.exp_avgs, runs.exp_avg_sqs, [], list(before), foreach=group["foreach"],
              fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)


class CPUAdamByName(AdamByName, DeepSpeedCPUAdam):  # type: ignore[misc]  # DeepSpeed has no annotations
    """By the kernel of DeepSpeed 0.19's DeepSpeedCPUAdam, which takes the step as an argument."""

    def update(self, group: Mapping[str, Any], runs: Runs) -> None:
        beta1, beta2 = group["betas"]
        for weight, grad, exp_avg, exp_avg_sq, step in zip(runs.weights, runs.grads, runs.exp_avgs, runs.exp_avg_sqs,
                                                           runs.steps, strict=True):
            self.ds_opt_adam.adam_update(self.opt_id, step, group["lr"], beta1, beta2, group["eps"],
                                         group["weight_decay"], group["bias_correction"], weight, grad, exp_avg,
                                         exp_avg_sq)
