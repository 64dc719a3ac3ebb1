"""Opening the data of a config, and building its loader."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prelora_ds.config.tree import Config
from prelora_ds.core.classes import difference
from prelora_ds.data.cache import ShardCache
from prelora_ds.data.datasets import ImagePipeline, decode_sample, rng_for
from prelora_ds.data.loader import Loader, TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import Stream
from prelora_ds.data.store import CorruptSampleError, SampleStore
from prelora_ds.data.unindexed import Unindexed, UnindexedLoader
from prelora_ds.errors import ConfigError

TrainData = Manifest | Unindexed
_TIMED_IMAGES = 32
_HEADROOM = 1.25


def open_data(config: Config) -> tuple[TrainData, Manifest]:
    """Open training and validation data, and check them against each other and their shards. Raises ConfigError.

    Only one rank of each host does so: it stats every shard, and reads the whole index.
    """
    data = config.data
    val = Manifest.load(data.val, key="data.val")
    if data.reader == "webdataset":
        assert data.samples_per_epoch is not None, "the config holds both or none"
        unindexed = Unindexed(data.train, data.samples_per_epoch, val.classes)
        unindexed.check()
        train: TrainData = unindexed
    else:
        train = Manifest.load(data.train, key="data.train")
    if problem := difference(val.classes, train.classes, "data.train"):
        raise ConfigError(
            "data.val",
            data.val,
            problem,
            "use train and val of the same data set; `prelora shards build` and "
            f"`prelora shards index` reuse the classes of train with --like {data.train}",
        )
    if data.tail == "drop" and len(train) < config.train.global_batch_size:
        raise ConfigError(
            "data.tail",
            "drop",
            f"drops everything: {len(train)} samples per epoch, "
            f"{config.train.global_batch_size} per batch",
            "use continue, or a smaller train.global_batch_size",
        )
    return train, val


def fingerprints(train: TrainData, val: Manifest) -> dict[str, str]:
    """Return the fingerprints of the data sets by config key, independent of their location.

    Unindexed data has no fingerprint.
    """
    return {
        key: data.fingerprint
        for key, data in (("data.train", train), ("data.val", val))
        if isinstance(data, Manifest)
    }


def samples_per_epoch(config: Config, samples: int) -> int:
    """Return how many of ``samples`` an epoch uses for training, according to `data.tail`."""
    return Stream(samples, config.train.global_batch_size, config.data.tail).samples_per_epoch


def make_loader(
    config: Config,
    data: TrainData,
    *,
    rank: int,
    world_size: int,
    workers: int,
    start_step: int = 0,
) -> Loader:
    """Return the loader of a run's training data. Raises ConfigError as `TrainLoader` does."""
    common: dict[str, Any] = {
        "seed": config.run.seed,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "rank": rank,
        "world_size": world_size,
        "workers": workers,
        "worker_start": config.data.worker_start,
        "start_step": start_step,
    }
    pipeline = ImagePipeline.from_config(config.model, config.data)
    if isinstance(data, Unindexed):
        return UnindexedLoader(data, pipeline, **common)
    cache = None
    if config.data.cache_dir is not None:
        cache = ShardCache(config.data.cache_dir, int(config.data.cache_gib * 2**30))
    return TrainLoader(data, pipeline, tail=config.data.tail, cache=cache, **common)


def cores_per_rank(masks: Sequence[tuple[str, frozenset[int]]]) -> int:
    """Return how many cores each rank has for itself, at least.

    masks: of each rank, its host and the cores that it may use. A launcher may have given each rank cores of its own;
        ranks with the same cores share them.
    """
    sharing = Counter(masks)
    return min(len(cores) // sharing[host, cores] for host, cores in masks)


def count_workers(
    config: Config, data: TrainData, *, cores: int, images_per_s: float | None
) -> tuple[int, str]:
    """Return `data.workers` as a number, and the reason in words.

    ``auto``: enough workers for ``images_per_s``, the predicted rate of this rank in the fastest
    phase (LoRA), plus 25 %, from the measured decode time of a few images. The maximum is the
    number of ``cores`` of a rank minus one for training; it is also the result if the required rate
    is unknown.
    """
    if config.data.workers != "auto":
        return config.data.workers, f"data.workers = {config.data.workers}"
    spare = max(1, cores - 1)
    if images_per_s is None or isinstance(data, Unindexed):
        return spare, f"{spare} data workers: the cores of a rank minus one"
    per_worker = decode_rate(config, data)
    workers = min(spare, math.ceil(_HEADROOM * images_per_s / per_worker))
    return workers, (
        f"{workers} data workers: each rank needs {images_per_s:,.0f} images/s in the LoRA phase "
        f"(predicted), a worker decodes {per_worker:,.0f}/s (measured), {spare} cores available"
    )


def decode_rate(config: Config, data: Manifest) -> float:
    """Measure on a few images how many images per second one worker decodes."""
    pipeline = ImagePipeline.from_config(config.model, config.data)
    store = SampleStore(data)
    rng = rng_for(0)
    done = 0
    started = 0.0
    for sample in [0, *rng.integers(len(data), size=_TIMED_IMAGES).tolist()]:
        try:
            pixels, _ = decode_sample(store, sample, pipeline.num_channels)
        except CorruptSampleError:
            continue  # the loader counts it
        pipeline.train_image(pixels, rng)
        done += 1
        started = started or time.perf_counter()  # the first image warms up
    store.close()
    return max(1, done - 1) / max(1e-9, time.perf_counter() - started)
