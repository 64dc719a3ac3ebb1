"""What a loop keeps of a model's outputs must not keep the graph of the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prelora_ds.engine.boundary import Passed


def outputs_of(y: torch.Tensor) -> dict[str, Any]:
    """Outputs like those of a decoder of transformers: a loss, and a cache that is an object."""
    return {"loss": y.sum(), "cache": SimpleNamespace(layers=[SimpleNamespace(keys=y, name="first")]), "other": (y, 3)}


def test_nothing_that_the_loop_keeps_refers_to_the_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    outputs = outputs_of(y)
    passed = Passed()
    kept = passed.across(outputs)
    gone = weakref.ref(y)
    memory, keys = y.data_ptr(), kept["cache"].layers[0].keys
    assert keys.data_ptr() == memory and torch.equal(keys, torch.full((3,), 2.0)), "it shares the memory"
    assert kept["cache"].layers[0].name == "first" and kept["other"][1] == 3
    assert outputs["cache"].layers[0].keys is y, "the model's own object is unchanged"
    passed.drop()
    del y, outputs
    gc.collect()
    assert gone() is None and kept["loss"].requires_grad


@pytest.mark.parametrize("part", [lambda kept: kept["loss"], lambda kept: kept["cache"].layers[0].keys.sum()])
def test_gradients_come_back_through_every_part(part: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    passed = Passed()
    kept = passed.across(outputs_of(x * 2))
    part(kept).backward()
    outputs, gradients = passed.take()
    torch.autograd.backward(outputs, gradients)
    assert torch.equal(x.grad, torch.full((3,), 2.0))


@dataclass(frozen=True, slots=True)
class Slotted:
    """An output whose class has no ``__dict__``."""

    logits: torch.Tensor
    words: tuple[str, ...]


def test_dataclasses_with_slots() -> None:
    y = torch.ones(3, requires_grad=True) * 2
    kept = Passed().across(Slotted(y, ("a", "b")))
    assert isinstance(kept, Slotted) and kept.words == ("a", "b")
    assert kept.logits is not y and torch.equal(kept.logits, y)


def test_objects_that_refer_to_each_other_are_copied_once() -> None:
    y = torch.ones(3, requires_grad=True) * 2
    first = SimpleNamespace(keys=y)
    first.itself, first.pair = first, [SimpleNamespace(back=first)]
    kept = Passed().across({"cache": first})["cache"]
    assert kept is not first and kept.itself is kept and kept.pair[0].back is kept and kept.keys is not y
