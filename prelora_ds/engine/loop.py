"""The engine of one phase as a loop of a user's own calls it, with errors for calls in a wrong order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from prelora_ds.core.pruning import Cut
from prelora_ds.engine.boundary import Passed
from prelora_ds.engine.engine import Engine


class StaleEngineError(RuntimeError):
    """An engine was used after its phase has ended."""


@dataclass(frozen=True)
class Taken:
    """An optimizer step that has been taken.

    loss: the mean loss of this rank's micro-batches, a scalar on the device.
    importance: as in `StepStats`.
    """

    loss: torch.Tensor
    skipped: bool
    importance: Mapping[str, float]


class LoopEngine:
    """The engine of one phase: call it like the model, then `backward`, then `step`.

    A later phase has another engine. After that every use of this one raises StaleEngineError.

    lr: the learning rate of the next optimizer step.
    taken: the step that has been taken and that `Phases.after_step` has not seen yet, or None.
    over: why there are no more steps, or "".
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ended = ""
        self._passed = Passed()
        self._adapter_lr: Mapping[str, float] = MappingProxyType({})
        self._cut: Cut | None = None
        self.lr = 0.0
        self.taken: Taken | None = None
        self.over = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model, from which the loss is to be computed. Collective at ZeRO stage 3."""
        return self._passed.across(self.live().ds(*args, **kwargs))

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of one micro-batch. Collective.

        loss: the mean loss of this rank's micro-batch, a scalar. It is not to be divided by `accumulation`.

        Raises RuntimeError after the last micro-batch of a step, after the last step, and if the loss does not depend
        on outputs of the model since the last step.
        """
        engine = self.live()
        if self.over:
            raise RuntimeError(self.over)
        if self.taken is not None:
            raise RuntimeError("backward() was called before after_step(), which follows every step()")
        if engine.micro_batches_done == engine.accumulation:
            raise RuntimeError(f"step() is due: {engine.accumulation} micro-batches have had their backward pass")
        (loss / engine.accumulation).backward()
        outputs, gradients = self._passed.take()
        if not outputs:
            raise RuntimeError("the loss does not depend on outputs that this engine has computed since the last step")
        engine.backward_from(outputs, gradients, loss)

    def step(self) -> None:
        """Take the optimizer step at the learning rate `lr`. Collective.

        Raises RuntimeError if the backward passes of some micro-batches are missing.
        """
        engine = self.live()
        if self.taken is not None:
            raise RuntimeError("step() was called before after_step(), which follows every step()")
        done, needed = engine.micro_batches_done, engine.accumulation
        if done != needed:
            raise RuntimeError(
                f"step() was called after {done} backward passes, but train.global_batch_size takes {needed} "
                f"micro-batches of {self.micro_batch_size} on each rank"
            )
        loss = engine.mean_loss()
        importance = engine.take_importance()
        skipped = engine.update(lr=self.lr, adapter_lr=self._adapter_lr, cut=self._cut)
        self._passed.drop()
        self.taken = Taken(loss, skipped, importance)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the context the model is in evaluation mode, and no gradients are computed."""
        with self.live().inference():
            yield

    @property
    def phase(self) -> str:
        """The name of this engine's phase."""
        return self._engine.plan.phase

    @property
    def accumulation(self) -> int:
        """How many micro-batches of this rank make an optimizer step, and so how often `backward` comes before it."""
        return self.live().accumulation

    @property
    def micro_batch_size(self) -> int:
        """The samples of a micro-batch in this phase."""
        return self._engine.config.train.micro_batch_size

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        device: torch.device = self.live().ds.device
        return device

    # ---- for `Phases`

    def live(self) -> Engine:
        """The engine. Raises StaleEngineError if its phase has ended."""
        if self._ended:
            raise StaleEngineError(self._ended)
        return self._engine

    def set_next(self, lr: float, adapter_lr: Mapping[str, float], cut: Cut | None) -> None:
        """Set what the next step needs, as in `Engine.finish_step`."""
        self.lr = lr
        self._adapter_lr = adapter_lr
        self._cut = cut

    def end(self, why: str) -> None:
        """Let every further use raise StaleEngineError with the text ``why``."""
        self._ended = why
        self._passed.drop()
