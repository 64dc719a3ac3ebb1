"""What stays the same in a run from its first step to its last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from prelora_ds.config.tree import Config
from prelora_ds.core.controller import PhaseController
from prelora_ds.core.layout import Layout
from prelora_ds.core.schedule import Timeline
from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.loader import Loader, eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, make_loader
from prelora_ds.engine.build import Engine
from prelora_ds.run.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """A run's settings, data and places.

    workers: processes that make batches. hosts: the host of each rank. opened: what ends with the run.
    """

    config: Config
    layout: Layout
    timeline: Timeline
    controller: PhaseController
    train_data: TrainData
    val_data: Manifest
    workers: int
    folder: RunFolder
    hosts: Sequence[str]
    opened: ExitStack = field(default_factory=ExitStack)

    @property
    def labels(self) -> int:
        return len(self.train_data.classes)

    def samples(self, step: int) -> int:
        """How many samples ``step`` optimizer steps have seen: the axis of TensorBoard."""
        return step * self.config.train.global_batch_size

    def loader(self, engine: Engine, start_step: int) -> Loader:
        """The training batches after ``start_step``, in the micro-batches of ``engine``'s phase, until the run ends."""
        loader = make_loader(engine.config, self.train_data, rank=dist.get_rank(), world_size=dist.get_world_size(),
                             workers=self.workers, start_step=start_step)
        self.opened.callback(loader.close)
        return loader

    def val_batches(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share of the validation data."""
        config = self.config
        return eval_batches(self.val_data, ImagePipeline.from_config(config.model, config.data), rank=dist.get_rank(),
                            world_size=dist.get_world_size(), batch_size=config.train.micro_batch_size,
                            workers=self.workers, worker_start=config.data.worker_start)
