"""From a config to its data and its loader."""

from __future__ import annotations

import math
import os
import time
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
_TIMED = 32  # images
_HEADROOM = 1.25


def open_data(config: Config, *, sizes: bool = True) -> tuple[TrainData, Manifest]:
    """Training and validation data, held against each other. Raises ConfigError.

    sizes: whether to look at every shard, which one rank per host does for all.
    """
    data = config.data
    val = Manifest.load(data.val, key="data.val", sizes=sizes)
    if data.reader == "webdataset":
        assert data.samples_per_epoch is not None, "the config holds both or none"
        unindexed = Unindexed(data.train, data.samples_per_epoch, val.classes)
        unindexed.check()
        train: TrainData = unindexed
    else:
        train = Manifest.load(data.train, key="data.train", sizes=sizes)
    if problem := difference(val.classes, train.classes, "data.train"):
        raise ConfigError(
            "data.val",
            data.val,
            problem,
            "name two parts of one data set; `prelora shards "
            "build` and `prelora shards index` give one the classes of the other by "
            f"--like {data.train}",
        )
    if data.tail == "drop" and len(train) < config.train.global_batch_size:
        raise ConfigError(
            "data.tail",
            "drop",
            f"leaves nothing: an epoch has {len(train)} samples, and a batch "
            f"{config.train.global_batch_size}",
            "use continue, or a smaller train.global_batch_size",
        )
    return train, val


def fingerprints(train: TrainData, val: Manifest) -> dict[str, str]:
    """What tells these data sets from others, wherever they lie, by key of the config; nothing of one without index."""
    return {
        key: data.fingerprint
        for key, data in (("data.train", train), ("data.val", val))
        if isinstance(data, Manifest)
    }


def samples_per_epoch(config: Config, samples: int) -> int:
    """Those of ``samples`` that an epoch gives to training, by `data.tail`."""
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
    """The loader of a run's training data. Raises ConfigError as `TrainLoader` does."""
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
    cache = (
        None
        if config.data.cache_dir is None
        else ShardCache(config.data.cache_dir, int(config.data.cache_gib * 2**30))
    )
    return TrainLoader(data, pipeline, tail=config.data.tail, cache=cache, **common)


def count_workers(
    config: Config, data: TrainData, *, ranks_here: int, images_per_s: float | None
) -> tuple[int, str]:
    """`data.workers` as a number, and why in words.

    ``auto``: enough for ``images_per_s`` of this rank, which is what the fastest phase (LoRA) wants, by the seconds
    that a few images take here, with a quarter more; never more than the cores of a rank (this host's over
    ``ranks_here``) less the one that trains, and that many where the wanted rate is not known.
    """
    if config.data.workers != "auto":
        return config.data.workers, f"data.workers = {config.data.workers}"
    spare = max(1, len(os.sched_getaffinity(0)) // ranks_here - 1)
    if images_per_s is None or isinstance(data, Unindexed):
        return spare, f"{spare} data workers: the cores of a rank less one"
    each = decode_rate(config, data)
    wanted = math.ceil(_HEADROOM * images_per_s / each)
    return min(spare, wanted), (
        f"{min(spare, wanted)} data workers: a rank wants {images_per_s:,.0f} images/s in the "
        f"LoRA phase (predicted), a worker makes {each:,.0f} (measured), {spare} cores are to "
        "spare"
    )


def decode_rate(config: Config, data: Manifest) -> float:
    """Images a second of one worker, measured on a few of them."""
    pipeline, store = ImagePipeline.from_config(config.model, config.data), SampleStore(data)
    rng, done, begun = rng_for(0), 0, 0.0
    for sample in [0, *rng.integers(len(data), size=_TIMED).tolist()]:
        try:
            pixels, _ = decode_sample(store, sample, pipeline.num_channels)
        except CorruptSampleError:
            continue  # the loader will count it
        pipeline.train_image(pixels, rng)
        done, begun = done + 1, begun or time.perf_counter()  # the first one warms up
    store.close()
    return max(1, done - 1) / max(1e-9, time.perf_counter() - begun)
