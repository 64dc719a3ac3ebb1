"""From a config to data, loader and worker count."""

from __future__ import annotations

import pickle
import shutil
from typing import Any

import pytest
import torch

from prelora_ds.config.load import load_config, validate
from prelora_ds.config.tree import Config
from prelora_ds.cost.forecast import fastest_images_per_s
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.setup import (
    cores_per_rank,
    count_workers,
    decode_rate,
    make_loader,
    open_data,
    samples_per_epoch,
)
from prelora_ds.data.shards.writer import digits, write_shards
from prelora_ds.data.unindexed import Unindexed, UnindexedLoader
from prelora_ds.errors import ConfigError
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.model.families import find_layout
from prelora_ds.model.vit import build_model
from prelora_ds.run.autosize import resolve_workers
from prelora_ds.start import check_run, examine_host


def config(shards: Any, size: int = 16, **data: Any) -> Config:
    return validate({"run": {"name": "r", "output_dir": "o"},
                     "model": {"image_size": 8, "patch_size": 2, "num_channels": 1},
                     "data": {"train": str(shards / "train"), "val": str(shards / "val")} | data,
                     "train": {"duration": "1 epoch", "global_batch_size": size, "micro_batch_size": size}}, "test")


def test_a_manifest_and_a_pattern_each_have_their_loader(shards):
    data = {"reader": "webdataset", "train": f"{shards}/train/shard-{{000000..000002}}.tar", "samples_per_epoch": 1437}
    for cfg, kind, loader_kind in ((config(shards), Manifest, TrainLoader),
                                   (config(shards, **data), Unindexed, UnindexedLoader)):
        train, val = open_data(cfg)
        assert isinstance(train, kind) and train.classes == val.classes and len(train) == 1437
        loader = make_loader(cfg, train, rank=0, world_size=1, workers=0)
        assert isinstance(loader, loader_kind) and loader.next()[0].images.shape == (16, 1, 8, 8)
        loader.close()


def test_a_dropped_tail_shortens_the_epoch_and_may_not_leave_it_empty(shards):
    assert samples_per_epoch(config(shards, tail="drop", size=64), 1437) == 22 * 64
    assert samples_per_epoch(config(shards, size=64), 1437) == 1437
    with pytest.raises(ConfigError, match=r"data\.tail = 'drop': drops everything"):
        open_data(config(shards, tail="drop", size=2048))


def test_what_one_rank_of_a_host_has_found_is_enough_for_the_others(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    tiny = load_config("launch/recipes/vit_tiny_debug.yaml",
                       [f"data.train={copy / 'train'}", f"data.val={copy / 'val'}"],
                       "ds_configs/zero2.json")
    facts = examine_host(tiny)
    row = facts.train_data.rows[700]
    received = pickle.loads(pickle.dumps(facts))
    (copy / "train" / "manifest.json").unlink()
    (copy / "train" / "shard-000001.tar").unlink()
    check_run(tiny, Ranks(rank=1, local_rank=1, world_size=2), received)
    assert received == facts and received.train_data.rows[700] == row, "the index is opened when it is read"
    with pytest.raises(ConfigError, match=r"data\.train = .*holds no manifest\.json"):
        examine_host(tiny)


def test_other_classes_are_refused(shards, tmp_path):
    write_shards([("a", next(digits("val"))[1], "png", 0)], tmp_path / "other", samples_per_shard=1, class_names=["x"])
    with pytest.raises(ConfigError, match=r"data\.val.*has 1 classes, but data\.train has 10\n(.|\n)*--like"):
        open_data(config(shards, val=str(tmp_path / "other")))


def test_classes_of_the_same_number_and_other_names_are_refused(shards, tmp_path):
    image = next(digits("val"))[1]
    samples = [(str(label), image, "png", label) for label in range(10)]
    names = [*map(str, range(9)), "ten"]
    write_shards(samples, tmp_path / "other", samples_per_shard=10, class_names=names)
    with pytest.raises(ConfigError, match=r"has 'ten' as class 9, but data\.train has '9'"):
        open_data(config(shards, val=str(tmp_path / "other")))


def test_workers_are_counted_by_what_the_lora_phase_wants_and_the_cores_to_spare(shards, monkeypatch):
    monkeypatch.setattr("prelora_ds.data.setup.decode_rate", lambda *_: 700.0)
    train = Manifest.load(shards / "train")

    def chosen(images_per_s: float | None, cores: int, **data: Any) -> int:
        return count_workers(config(shards, **data), train, cores=cores, images_per_s=images_per_s)[0]

    assert chosen(500.0, 8, workers=3) == 3
    assert chosen(500.0, 8, workers="auto") == 1  # 1.25 * 500 / 700
    assert chosen(2000.0, 8, workers="auto") == 4
    assert chosen(50_000.0, 8, workers="auto") == 7
    assert chosen(None, 8, workers="auto") == 7
    assert chosen(None, 1, workers="auto") == 1
    _, why = count_workers(config(shards, workers="auto"), train, cores=8, images_per_s=2000.0)
    assert why == ("4 data workers: each rank needs 2,000 images/s in the LoRA phase (predicted), "
                   "a worker decodes 700/s (measured), 7 cores available")


@pytest.mark.parametrize(("masks", "cores"), [
    ([("a", range(32))] * 4, 8),  # no binding: four ranks share a host
    ([("a", range(8 * rank, 8 * rank + 8)) for rank in range(4)], 8),  # each rank has cores of its own
    ([("a", range(8)), ("b", range(8))], 8),  # the same numbers on two hosts
    ([("a", range(16)), ("a", range(16)), ("b", range(4)), ("b", range(4, 8))], 4),
    ([("a", range(1))] * 2, 0),
])
def test_ranks_divide_only_the_cores_that_they_share(masks, cores):
    assert cores_per_rank([(host, frozenset(numbers)) for host, numbers in masks]) == cores


def test_a_worker_s_rate_is_measured(shards):
    assert decode_rate(config(shards), Manifest.load(shards / "train")) > 10


@pytest.mark.parametrize(("name", "known"), [("A100-40", True), ("H200", True), (None, False)])
def test_the_rate_of_the_fastest_phase_is_that_of_a_known_gpu(shards, name, known):
    cfg = config(shards)
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch_size": 4})})
    with torch.device("meta"):
        layout = find_layout(build_model(cfg.model, 10), cfg.lora.families)
    rate = fastest_images_per_s(cfg, layout, 2, 4, name)
    assert (rate is not None and rate > 0) == known
    assert fastest_images_per_s(cfg, layout, 4, 6, name) is None  # hosts that differ


def test_the_rate_of_the_fastest_phase_is_that_of_its_own_offloading(shards):
    cfg = config(shards)
    with torch.device("meta"):
        layout = find_layout(build_model(cfg.model, 10), cfg.lora.families)
    rates = {}
    for device in ("none", "cpu"):
        zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}}}
        rates[device] = fastest_images_per_s(cfg.model_copy(update={"deepspeed": zero}), layout, 1, 1, "A100-80")
    # Moments that lie on the host take their way over PCIe, which no other phase or stage makes up for.
    assert 0 < rates["cpu"] < rates["none"]


def test_no_rate_is_predicted_for_workers_that_the_recipe_counts(shards):
    """Neither a layout nor a process group is asked for it."""
    assert resolve_workers(config(shards, workers=3), Manifest.load(shards / "train"), None, None) == 3
