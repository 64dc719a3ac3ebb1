from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prelora_ds.engine.fragments import Fragment
from prelora_ds.engine.optimizer import AdamByName, StepRanges, TorchAdamByName

# Three names in one flat tensor, with two elements of padding after a, and three at the end.
SIZES = {"a": 5, "b": 3, "c": 8}
OFFSETS = {"a": 0, "b": 7, "c": 10}
LENGTH = 21
SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}


def flat_tensor() -> torch.Tensor:
    flat = torch.zeros(LENGTH)
    generator = torch.Generator().manual_seed(0)
    for name, offset in OFFSETS.items():
        flat[offset : offset + SIZES[name]] = torch.randn(SIZES[name], generator=generator)
    return flat.requires_grad_()


def bound(
    flat: torch.Tensor, *, other_ranks: tuple[str, ...] = (), of: type[AdamByName] = TorchAdamByName
) -> AdamByName:
    optimizer = of([flat], **SETTINGS)
    parts = [
        Fragment(name, 0, SIZES[name], flat, offset) for name, offset in reversed(OFFSETS.items())
    ]
    optimizer.bind([(flat, [*other_ranks, *OFFSETS])], parts)
    return optimizer


def give_gradient(flat: torch.Tensor, step: int) -> None:
    gradient = torch.randn(LENGTH, generator=torch.Generator().manual_seed(step))
    inside = flat.detach() != 0
    flat.grad = gradient * inside


def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()[OFFSETS[name] : OFFSETS[name] + SIZES[name]].clone()


def test_each_name_steps_as_in_an_optimizer_of_its_own() -> None:
    """``b`` and ``c`` are inactive in some steps; the oracle is one torch AdamW per name."""
    flat = flat_tensor()
    optimizer = bound(flat)
    own = {name: part(name, flat).requires_grad_() for name in SIZES}
    stock = {name: torch.optim.AdamW([value], **SETTINGS) for name, value in own.items()}
    taken = dict.fromkeys(SIZES, 0)
    for step, names in enumerate(["abc", "abc", "ac", "a", "ab", "abc", "bc", "abc"]):
        optimizer.active = None if names == "abc" else frozenset(names)
        give_gradient(flat, step)
        optimizer.step()
        for name in names:
            own[name].grad = part(name, flat.grad)
            stock[name].step()
            taken[name] += 1
        assert optimizer.steps == taken
        for name, value in own.items():
            torch.testing.assert_close(part(name, flat), value.detach(), rtol=1e-6, atol=1e-7)
    assert len(set(taken.values())) > 1
    for name, value in own.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = part(name, optimizer.state[flat][key])
            torch.testing.assert_close(moment, stock[name].state[value][key], rtol=1e-6, atol=1e-7)
    padding = torch.ones(LENGTH, dtype=torch.bool)
    for name, offset in OFFSETS.items():
        padding[offset : offset + SIZES[name]] = False
    assert not flat.detach()[padding].any()


def test_with_all_names_active_at_equal_steps_it_is_torch_s_adamw_bitwise() -> None:
    flat, other = flat_tensor(), flat_tensor()
    optimizer, stock = bound(flat), torch.optim.AdamW([other], **SETTINGS)
    for step in range(4):
        give_gradient(flat, step)
        other.grad = flat.grad.clone()
        optimizer.step()
        stock.step()
        assert torch.equal(flat, other)


def test_an_inactive_name_keeps_every_bit_whatever_its_gradient() -> None:
    flat = flat_tensor()
    optimizer = bound(flat)
    give_gradient(flat, 0)
    optimizer.step()
    tensors = (flat, *(optimizer.state[flat][key] for key in ("exp_avg", "exp_avg_sq")))
    before = [part("b", tensor) for tensor in tensors]
    optimizer.active = frozenset("ac")
    give_gradient(flat, 1)
    flat.grad[OFFSETS["b"] : OFFSETS["b"] + SIZES["b"]] = float("nan")
    optimizer.step()
    assert all(
        torch.equal(part("b", tensor), old) for tensor, old in zip(tensors, before, strict=True)
    )
    assert torch.isfinite(flat).all() and optimizer.steps == {"a": 2, "b": 1, "c": 2}


def test_neighbours_with_equal_steps_are_one_range_and_others_have_their_own() -> None:
    flat = flat_tensor()
    seen: list[tuple[list[int], list[int]]] = []

    class Watched(TorchAdamByName):
        def update(self, group: Mapping[str, Any], ranges: StepRanges) -> None:
            seen.append(([len(weights) for weights in ranges.weights], ranges.steps))

    optimizer = bound(flat, of=Watched)
    give_gradient(flat, 0)
    optimizer.step()
    optimizer.steps |= {"b": 0, "c": 0}  # as after their restart
    optimizer.step()
    optimizer.active = frozenset("ac")
    optimizer.step()
    optimizer.active = frozenset()
    optimizer.step()
    assert seen == [([21], [1]), ([7, 14], [2, 1]), ([7, 11], [3, 2])]


def test_names_on_other_ranks_advance_their_steps_too() -> None:
    flat = flat_tensor()
    optimizer = bound(flat, other_ranks=("elsewhere",))
    give_gradient(flat, 0)
    optimizer.step()
    assert optimizer.steps == {"elsewhere": 1, "a": 1, "b": 1, "c": 1}


def test_a_rank_that_holds_only_padding_counts_and_exports_like_the_others() -> None:
    flat = torch.zeros(4, requires_grad=True)
    optimizer = TorchAdamByName([flat], **SETTINGS)
    optimizer.bind([(flat, ["elsewhere"])], [])
    flat.grad = torch.zeros(4)
    optimizer.step()
    assert optimizer.steps == {"elsewhere": 1} and not flat.any()
    assert optimizer.state[flat].keys() == {"exp_avg", "exp_avg_sq"}


def test_replaced_moments_are_the_ones_that_are_updated() -> None:
    flat = flat_tensor()
    optimizer = bound(flat)
    give_gradient(flat, 0)
    optimizer.step()
    fresh = torch.zeros(LENGTH)
    optimizer.state[flat]["exp_avg"] = fresh
    optimizer.step()
    assert fresh.any()


def test_until_it_is_bound_it_steps_as_its_parent_does() -> None:
    flat = flat_tensor()
    optimizer = TorchAdamByName([flat], **SETTINGS)
    give_gradient(flat, 0)
    optimizer.step()
    assert optimizer.state[flat]["step"] == 1 and not optimizer.steps


def test_the_fused_kernel_of_torch_takes_the_steps_of_each_name() -> None:
    """It agrees with the other kernels within rounding, also where the steps of names differ."""
    flats = [flat_tensor(), flat_tensor()]
    plain, fused = (bound(flat) for flat in flats)
    fused.param_groups[0]["fused"] = True
    for step, names in enumerate(["abc", "ac", "abc", "b", "abc"]):
        for flat, optimizer in zip(flats, (plain, fused), strict=True):
            optimizer.active = None if names == "abc" else frozenset(names)
            give_gradient(flat, step)
            optimizer.step()
    assert fused.steps == plain.steps == {"a": 4, "b": 4, "c": 4}
    torch.testing.assert_close(flats[1].detach(), flats[0].detach(), rtol=1e-6, atol=1e-7)
