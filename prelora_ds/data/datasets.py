"""The data sets of the workers: they turn samples into the tensors of a micro-batch."""

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
# Keeps these random streams distinct; `epoch_order` uses no such key.
_PIXEL_KEY = 1
_REPLACEMENT_KEY = 2
_REPLACEMENTS = 10


@dataclass(frozen=True)
class ImagePipeline:
    """Image preprocessing: size, channels, crop and random augmentation."""

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
        """The preprocessing of a run."""
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
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0

    def train_image(self, pixels: Pixels, rng: np.random.Generator) -> Tensor:
        """Transform uint8 [H, W, C] to uint8 [C, S, S]; all randomness comes from ``rng``."""
        image = train_crop(pixels, image_size=self.image_size, crop=self.crop, rng=rng)
        return augment(
            image, flip=self.flip, level=self.augment, random_erasing=self.random_erasing, rng=rng
        )

    def eval_image(self, pixels: Pixels) -> Tensor:
        """Transform uint8 [H, W, C] to uint8 [C, S, S] deterministically."""
        return eval_transform(pixels, image_size=self.image_size, crop=self.crop)

    def mix(self, seed: int, epochs: NDArray[np.int64], first: int) -> Tensor | None:
        """Return what `draw_mix` draws for these rows; None if nothing is mixed."""
        if not self.mixes:
            return None
        return draw_mix(
            seed, epochs, first, mixup=self.mixup, cutmix=self.cutmix, size=self.image_size
        )

    def empty_batch(self, count: int) -> Tensor:
        """Return an uninitialised uint8 [count, C, S, S], in shared memory if this is a worker."""
        images = torch.empty(
            (count, self.num_channels, self.image_size, self.image_size), dtype=torch.uint8
        )
        return images if get_worker_info() is None else images.share_memory_()


class BatchRows(NamedTuple):
    """Rows of a global batch: epochs [B] and samples [B].

    ``stream_offset`` is the index of the first row in the stream.
    """

    epochs: NDArray[np.int64]
    samples: NDArray[np.int64]
    stream_offset: int


class TrainImages(Dataset[MicroBatch]):
    """The micro-batches for given rows; random draws are a function of (seed, epoch, sample)."""

    def __init__(self, store: SampleStore, pipeline: ImagePipeline, seed: int) -> None:
        self.store, self._pipeline, self._seed = store, pipeline, seed

    def __getitems__(self, rows: BatchRows) -> MicroBatch:
        images = self._pipeline.empty_batch(len(rows.samples))
        labels = []
        faults = []
        epochs, samples = rows.epochs.tolist(), rows.samples.tolist()
        for image, epoch, sample in zip(images, epochs, samples, strict=True):
            pixels, label, sample_faults = self._sample(epoch, sample)
            rng = rng_for(self._seed, epoch, sample, _PIXEL_KEY)
            image.copy_(self._pipeline.train_image(pixels, rng))
            labels.append(label)
            faults += sample_faults
        mix = self._pipeline.mix(self._seed, rows.epochs, rows.stream_offset)
        return MicroBatch(images, torch.tensor(labels), mix, tuple(faults))

    def _sample(self, epoch: int, sample: int) -> tuple[Pixels, int, list[str]]:
        """Return (pixels, label, faults) of a sample.

        If the sample cannot be read, pixels and label are those of a replacement, and ``faults``
        has one text that reports it. The replacement is a function of (seed, epoch, sample), so
        it is the same with every world size.
        """
        num_channels = self._pipeline.num_channels
        try:
            return *decode_sample(self.store, sample, num_channels), []
        except CorruptSampleError as error:
            fault = error.problem
        rng = rng_for(self._seed, epoch, sample, _REPLACEMENT_KEY)
        for other in rng.integers(len(self.store.manifest), size=_REPLACEMENTS).tolist():
            try:
                pixels, label = decode_sample(self.store, other, num_channels)
            except CorruptSampleError as error:
                last = error.problem
                remedy = error.remedy
            else:
                return pixels, label, [f"{fault}; replaced by sample {other}"]
        raise CorruptSampleError(
            f"{fault}; and {_REPLACEMENTS} replacement samples could not be read either, the last: "
            f"{last}",
            remedy,
        )


class EvalImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Batches (images, labels, mask) of given samples; PADDING gives a black image and False."""

    def __init__(self, store: SampleStore, pipeline: ImagePipeline) -> None:
        self.store, self._pipeline = store, pipeline

    def __getitems__(self, samples: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        images = self._pipeline.empty_batch(len(samples))
        labels = []
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
    """Return (uint8 [H, W, C], label) of a sample. Raises CorruptSampleError."""
    data, label = store.read(sample)
    try:
        return decode(data, num_channels), label
    except UndecodableError as error:
        raise store.corrupt(sample, f"not an image: {error}", undecodable=True) from error


def rng_for(*key: int) -> np.random.Generator:
    """Return a generator that is a function of ``key``."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def identity(batch: Any) -> Any:
    """Return ``batch``: the collate function, since the data sets here return whole batches."""
    return batch
