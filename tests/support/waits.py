"""Count where a host would wait for its device, on a CPU, where everything is on the host.

What counts is a call that waits if its tensor is on a GPU: reading a value (`item`, `bool`, `tolist`, `cpu`, `numpy`),
asking how many elements a mask selects, a new tensor on a device from values of the host, and waiting for the
accelerator. What is computed from the result of `cpu` is on the host, and its values are read without a wait. Of our
own code a copy to a device counts too, unless it is asked to be non-blocking; DeepSpeed makes many of tensors that are
there already. That is an upper bound: some tensors are on the host also where there is a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prelora_ds

READS = ("_local_scalar_dense", "nonzero", "masked_select")  # operators whose result depends on values
METHODS = ("tolist", "cpu", "numpy")
CONSTRUCTORS = ("ByteTensor", "FloatTensor")  # of DeepSpeed's accelerator, from values of the host
OURS = str(Path(prelora_ds.__file__).parent)


class Waits(Counter[tuple[str, str]]):
    """(owner, place in the code) -> how often it would wait; the owner is "ours", "DeepSpeed" or "torch"."""

    def of(self, owner: str) -> dict[str, int]:
        return {place: count for (who, place), count in sorted(self.items()) if who == owner}

    def total(self, owner: str) -> int:
        return sum(self.of(owner).values())


@contextlib.contextmanager
def counting_waits() -> Iterator[Waits]:
    """Count the waits of the context's body."""
    from deepspeed.accelerator import get_accelerator

    waits = Waits()
    accelerator = type(get_accelerator())
    on_host: set[int] = set()  # the ids of tensors that have been read to the host, and of what is computed from them
    kept = []  # so that no id is used again

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            if tensors and all(id(each) in on_host for each in tensors):
                host(result)
            elif func.overloadpacket.__name__ in READS:
                waits[_caller()] += 1
            return result

    def host(result: Any) -> None:
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        on_host.update(map(id, tensors))
        kept.extend(tensors)

    def counted(function: Callable[..., Any], blocks: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = _caller()
            if blocks(*args, **kwargs) and (blocks is not copies or caller[0] == "ours"):
                waits[caller] += 1
            result = function(*args, **kwargs)
            if function.__name__ == "cpu":
                result = result.clone() if result is args[0] else result  # as on a GPU
                host(result)
            return result

        return call

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    def copies(tensor: Any, *args: Any, **kwargs: Any) -> bool:
        to = [*args, *kwargs.values()]
        return any(isinstance(each, str | torch.device) for each in to) and not kwargs.get("non_blocking", False)

    def placed(*args: Any, device: Any = None, **kwargs: Any) -> bool:
        return device is not None

    with contextlib.ExitStack() as stack:
        for owner, name, blocks in [*((torch.Tensor, method, always) for method in METHODS),
                                    (torch.Tensor, "to", copies), (torch, "tensor", placed),
                                    (accelerator, "synchronize", always)]:
            real = getattr(owner, name)
            setattr(owner, name, counted(real, blocks))
            stack.callback(setattr, owner, name, real)
        for name in CONSTRUCTORS:
            constructor = counted(getattr(torch, name), always)
            real = vars(accelerator)[name]
            setattr(accelerator, name, property(lambda _, constructor=constructor: constructor))
            stack.callback(setattr, accelerator, name, real)
        stack.enter_context(Reads())
        yield waits


def _caller() -> tuple[str, str]:
    """Return who called, and where: the innermost frame that belongs neither to torch nor to this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        place = f"{Path(path).name}:{frame.f_code.co_name}:{frame.f_lineno}"
        if path.startswith(OURS):
            return "ours", place
        if "/deepspeed/" in path:
            return "DeepSpeed", place
        if path != __file__ and "/torch/" not in path:
            return "torch", place
        frame = frame.f_back
    return "torch", "?"
