"""What a worker does: samples in, the tensors of a micro-batch out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from prelora_ds.config.data import Augment, Crop, DataConfig
from prelora_ds.config.model import ModelConfig
from prelora_ds.data.augment import augment
from prelora_ds.data.batch import MicroBatch, draw_mix
from prelora_ds.data.decode import Pixels, UndecodableError, decode
from prelora_ds.data.store import CorruptSampleError, SampleStore
from prelora_ds.data.transforms import eval_transform, train_crop

PADDING = -1
_PIXEL_KEY, _REPLACEMENT_KEY = 1, 2  # apart from the key of `epoch_order`, which has none
_REPLACEMENTS = 10


@dataclass(frozen=True)
class ImagePipeline:
    """How a picture becomes an input: size, channels, crop, and what chance does to it in training."""

    image_size: int
    num_channels: int
    crop: Crop
    flip: bool = False
    augment: Augment = "none"
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def from_config(cls, model: ModelConfig, data: DataConfig) -> ImagePipeline:
        """That of a run."""
        return cls(
            model.image_size,
            model.num_channels,
            data.crop,
            data.flip,
            data.augment,
            data.random_erasing,
            data.mixup_alpha,
            data.cutmix,
        )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def train_image(self, pixels: Pixels, rng: np.random.Generator) -> Tensor:
        """uint8 [H, W, C] -> uint8 [C, S, S], at random by ``rng`` alone."""
        image = train_crop(pixels, image_size=self.image_size, crop=self.crop, rng=rng)
        return augment(
            image, flip=self.flip, level=self.augment, random_erasing=self.random_erasing, rng=rng
        )

    def eval_image(self, pixels: Pixels) -> Tensor:
        """uint8 [H, W, C] -> uint8 [C, S, S], without chance."""
        return eval_transform(pixels, image_size=self.image_size, crop=self.crop)

    def mix(self, seed: int, epochs: NDArray[np.int64], first: int) -> Tensor | None:
        """What `draw_mix` draws for these rows, or None."""
        if not self.mixes:
            return None
        return draw_mix(
            seed, epochs, first, mixup=self.mixup, cutmix=self.cutmix, size=self.image_size
        )

    def empty_batch(self, count: int) -> Tensor:
        """uint8 [count, C, S, S], in a worker where the main process sees it without a copy."""
        images = torch.empty(
            (count, self.num_channels, self.image_size, self.image_size), dtype=torch.uint8
        )
        return images if get_worker_info() is None else images.share_memory_()


class BatchRows(NamedTuple):
    """Rows of a global batch: epochs [B] and samples [B]; ``first`` is the place of the first in the stream."""

    epochs: NDArray[np.int64]
    samples: NDArray[np.int64]
    stream_offset: int


class TrainImages(Dataset[MicroBatch]):
    """A micro-batch for given rows. Chance is keyed by (seed, epoch, sample), not by who draws it."""

    def __init__(self, store: SampleStore, pipeline: ImagePipeline, seed: int) -> None:
        self.store, self._pipeline, self._seed = store, pipeline, seed

    def __getitems__(self, rows: BatchRows) -> MicroBatch:
        images, labels, faults = self._pipeline.empty_batch(len(rows.samples)), [], []
        for image, epoch, sample in zip(
            images, rows.epochs.tolist(), rows.samples.tolist(), strict=True
        ):
            pixels, label, fault = self._sample(epoch, sample)
            image.copy_(
                self._pipeline.train_image(pixels, rng_for(self._seed, epoch, sample, _PIXEL_KEY))
            )
            labels.append(label)
            faults += fault
        return MicroBatch(
            images,
            torch.tensor(labels),
            self._pipeline.mix(self._seed, rows.epochs, rows.stream_offset),
            tuple(faults),
        )

    def _sample(self, epoch: int, sample: int) -> tuple[Pixels, int, list[str]]:
        """Pixels and label; where they cannot be read, those of another sample, and a text that says so.

        The other one is a function of (seed, epoch, sample), so all world sizes take the same.
        """
        try:
            return *decode_sample(self.store, sample, self._pipeline.num_channels), []
        except CorruptSampleError as error:
            fault = error.problem
        rng = rng_for(self._seed, epoch, sample, _REPLACEMENT_KEY)
        for other in rng.integers(len(self.store.manifest), size=_REPLACEMENTS).tolist():
            try:
                return *decode_sample(self.store, other, self._pipeline.num_channels), [
                    f"{fault}; sample {other} is in its place"
                ]
            except CorruptSampleError as error:
                last = error.problem
                remedy = error.remedy
        raise CorruptSampleError(
            f"{fault}; nor could {_REPLACEMENTS} others be read that were to take its place, the "
            f"last: {last}",
            remedy,
        )


class EvalImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(images, labels, mask) for given samples; PADDING gives a black image and False."""

    def __init__(self, store: SampleStore, pipeline: ImagePipeline) -> None:
        self.store, self._pipeline = store, pipeline

    def __getitems__(self, samples: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = self._pipeline.empty_batch(len(samples)), []
        for image, sample in zip(images, samples, strict=True):
            if sample == PADDING:
                image.zero_()
                labels.append(0)
            else:
                pixels, label = decode_sample(self.store, sample, self._pipeline.num_channels)
                image.copy_(self._pipeline.eval_image(pixels))
                labels.append(label)
        return images, torch.tensor(labels), torch.tensor([sample != PADDING for sample in samples])


def decode_sample(store: SampleStore, sample: int, num_channels: int) -> tuple[Pixels, int]:
    """(uint8 [H, W, C], label). Raises CorruptSampleError."""
    data, label = store.read(sample)
    try:
        return decode(data, num_channels), label
    except UndecodableError as error:
        raise store.corrupt(sample, f"no picture: {error}", undecodable=True) from error


def rng_for(*key: int) -> np.random.Generator:
    """A generator that is a function of ``key``."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def identity(batch: Any) -> Any:
    """The collate function: a data set here gives whole batches."""
    return batch
