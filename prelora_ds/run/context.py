"""The parts of a run that do not change between its first step and its last."""

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
from prelora_ds.data.loader import eval_batches
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import TrainData, make_loader
from prelora_ds.engine.engine import Engine
from prelora_ds.engine.feed import DeviceFeed
from prelora_ds.run.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """The settings, the data and the folder of a run.

    workers: the number of processes that prepare batches.
    hosts: the host name of each rank.
    cleanup: closes what has to be closed at the end of the run.
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
    cleanup: ExitStack = field(default_factory=ExitStack)

    @property
    def labels(self) -> int:
        return len(self.train_data.classes)

    def samples(self, step: int) -> int:
        """Return the number of samples in ``step`` optimizer steps: the axis of all trackers."""
        return step * self.config.train.global_batch_size

    def feed(self, engine: Engine, start_step: int) -> DeviceFeed:
        """Load the training batches after ``start_step``, in micro-batches of the engine's phase.

        The loader is closed at the end of the run at the latest.
        """
        loader = make_loader(
            engine.config,
            self.train_data,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            workers=self.workers,
            start_step=start_step,
        )
        self.cleanup.callback(loader.close)
        return DeviceFeed(loader, engine.ds.device)

    def val_batches(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Load this rank's share of the validation data."""
        config = self.config
        return eval_batches(
            self.val_data,
            ImagePipeline.from_config(config.model, config.data),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            batch_size=config.train.micro_batch_size,
            workers=self.workers,
            worker_start=config.data.worker_start,
        )
