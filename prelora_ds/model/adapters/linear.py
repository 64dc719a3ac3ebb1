"""What all our linears with an adapter have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from prelora_ds.core.adapters import AdapterSpec, kind_of

BLOCK = 1 << 16  # elements of a block of rows, whose fp32 copy of 256 KiB is in the second-level cache


class AdaptedLinear(nn.Module):
    """A linear with an adapter, computed by our own code.

    active: whether the adapter trains now; an inactive one still adds its part to the output.
    importance: while it is measured, the sum over samples of the L2 norm of the output, fp64, otherwise None.
    micro_batches: how many backward passes make an optimizer step.
    """

    active: bool = True
    micro_batches: int = 1
    importance: torch.Tensor | None = None

    def refresh(self, *, inactive: bool = False) -> None:
        """Update whatever the linear has computed from its weight and its leaves, because these have changed.

        inactive: whether the leaves of an inactive adapter may have changed, too.
        """

    def besides_leaves(self) -> list[torch.Tensor]:
        """Return the tensors that the linear holds besides its parameters."""
        return []

    def count_importance(self, output: torch.Tensor) -> None:
        """Add ``output`` [samples, ..., features] to `importance`, if that is measured."""
        if self.importance is not None and self.training and not _is_recomputed():
            self.importance += norms_of_samples(output.detach()).sum(dtype=torch.float64)


class OwnLinear(AdaptedLinear):
    """A linear with an adapter that is not one of peft's layers.

    Its leaves have the names and shapes of the kind's pure half, and are zero.
    """

    def __init__(self, linear: nn.Linear, spec: AdapterSpec) -> None:
        super().__init__()
        self.base_layer = linear
        self.spec = spec
        weight = linear.weight
        shapes = kind_of(spec).parameters(tuple(weight.shape), spec)
        self.leaf_names = tuple(shapes)
        for leaf, shape in shapes.items():
            holder, _, name = leaf.rpartition(".")
            if holder:
                self.add_module(holder, nn.Module())
            zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            self.get_submodule(holder).register_parameter(name, nn.Parameter(zeros))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def leaves(self, *names: str) -> list[torch.Tensor]:
        """Return the leaves ``names``, without their gradients if the adapter is inactive."""
        leaves = [self.get_parameter(name) for name in names]
        return list(leaves) if self.active else [leaf.detach() for leaf in leaves]


def generator_of(name: str, spec: AdapterSpec, cycle: int) -> torch.Generator:
    """Return the generator of the first value of the parameter ``name``, the same on every rank.

    cycle: `Plan.cycle`.
    """
    key = f"{spec.seed}/{name}" if cycle == 0 else f"{spec.seed}/{cycle}/{name}"
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def adapted_linears(module: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Return path and linear for each linear of ``module`` that is an `AdaptedLinear`."""
    return ((path, m) for path, m in module.named_modules() if isinstance(m, AdaptedLinear))


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of values of ``dtype`` are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def blocks_of_rows(*matrices: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield views of the same rows of ``matrices`` [rows, ...], which together are all rows.

    On a CPU, torch 2.14 makes an fp32 copy of a BF16 matrix that is combined with an fp32 one or summed in fp32. The
    copy of a block stays in the cache; that of the whole matrix would be written to memory and read again. Elsewhere
    there is one block.
    """
    first = matrices[0]
    rows = BLOCK // max(1, first.shape[1]) if first.device.type == "cpu" else first.shape[0]
    return zip(*(matrix.split(max(1, rows)) for matrix in matrices), strict=True)


def norms_of_samples(output: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each sample of ``output`` [samples, ..., features], in fp32.

    On a CPU it takes one sample at a time: torch 2.14 makes an fp32 copy of what it reduces in fp32, and memory for a
    copy of everything would be mapped again in each call.
    """
    if output.device.type != "cpu":
        norms: torch.Tensor = torch.linalg.vector_norm(output.flatten(1), dim=1, dtype=torch.float32)
        return norms
    one_by_one = [torch.linalg.vector_norm(sample, dtype=torch.float32) for sample in output.flatten(1)]
    return torch.stack(one_by_one)


def _is_recomputed() -> bool:
    """Whether this is the second forward pass of activation checkpointing, which runs inside a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)
