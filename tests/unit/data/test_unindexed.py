"""`data.reader: webdataset`: equal batches without end, and nothing skipped in silence."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prelora_ds.data.datasets import ImagePipeline
from prelora_ds.data.manifest import Manifest
from prelora_ds.data.order import Position
from prelora_ds.data.shards.writer import write_shards
from prelora_ds.data.store import CorruptSampleError
from prelora_ds.data.unindexed import Unindexed, UnindexedLoader
from prelora_ds.errors import ConfigError

SAMPLES = 40
PIPELINE = ImagePipeline(8, 3, "inception", flip=True)
CLASSES = tuple(map(str, range(SAMPLES)))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(((f"{i:03d}", png(i), "png", i) for i in range(SAMPLES)), tmp_path / "train", samples_per_shard=10,
                 class_names=CLASSES)
    for name in ("manifest.json", "index.npy"):
        (tmp_path / "train" / name).unlink()
    return tmp_path / "train"


def loader(folder: Path, pattern: str = "shard-{000000..000003}.tar", pipeline: ImagePipeline = PIPELINE,
           classes: tuple = CLASSES, **options: object) -> UnindexedLoader:
    defaults = {"seed": 1, "global_batch_size": 12, "micro_batch_size": 4, "rank": 0, "world_size": 1, "workers": 0}
    return UnindexedLoader(Unindexed(f"{folder}/{pattern}", SAMPLES, classes), pipeline, **defaults | options)


def taken(made: UnindexedLoader, steps: int = 8) -> tuple[torch.Tensor, list[int], list[str]]:
    batches = [batch for _ in range(steps) for batch in made.next()]
    made.close()
    return (torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]).tolist(),
            [fault for b in batches for fault in b.faults])


def test_batches_are_whole_and_cover_the_data_in_the_long_run(folder):
    images, labels, faults = taken(loader(folder), 30)
    assert images.shape == (360, 3, 8, 8) and images.dtype == torch.uint8 and not faults
    assert len(set(labels)) > 0.9 * SAMPLES


def test_ranks_get_equal_batches_and_other_samples(folder):
    one, other = (taken(loader(folder, rank=rank, world_size=3, global_batch_size=36)) for rank in (0, 1))
    assert one[0].shape == other[0].shape and one[1] != other[1]


def test_the_same_settings_give_the_same_batches_and_another_start_others(folder):
    one, again, later = taken(loader(folder)), taken(loader(folder)), taken(loader(folder, start_step=5))
    assert torch.equal(one[0], again[0]) and one[1:] == again[1:] and one[1] != later[1]


def test_workers_take_turns_and_rebatch_and_state_count_on(folder):
    made = loader(folder, workers=2)
    for _ in range(3):
        made.next()
    made.rebatch(6)
    assert [len(batch.images) for batch in made.next()] == [6, 6]
    assert made.step == 4 and made.state == Position(1, 8)
    made.close()


def test_pairs_are_mixed_here_too(folder):
    pipeline = ImagePipeline(8, 3, "inception", mixup=0.5)
    [first, *_], [second, *_] = (loader(folder, pipeline=pipeline, workers=workers).next() for workers in (0, 1))
    assert first.mix.shape == (2, 6) and torch.equal(first.mix, second.mix)


def test_what_is_broken_is_counted_and_pickles_are_never_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "opened"),)

    members = {"a.png": png(1), "a.cls": b"1", "a.pkl": pickle.dumps(Bomb()), "b.png": pickle.dumps(Bomb()),
               "b.cls": b"2", "c.png": png(3), "d.png": png(4), "d.cls": b"40", "e.png": png(5), "e.cls": b"five"}
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, labels, faults = taken(loader(folder, "odd.tar"), 2)
    assert set(labels) == {1} and not (tmp_path / "opened").exists()
    for key, problem in (("b", "the bytes are not JPEG"), ("c", "each sample needs exactly one image"),
                         ("d", "has the label 40, which is not"), ("e", "has b'five' in its .cls")):
        assert any(f"sample {key} of {folder}/odd.tar" in fault and problem in fault for fault in faults), (key, faults)


def test_a_missing_shard_is_a_fault_and_nothing_but_missing_shards_an_error(folder):
    _, labels, faults = taken(loader(folder, "shard-{000003..000004}.tar"))
    assert set(labels) <= set(range(30, 40)) and any("shard-000004.tar" in fault for fault in faults)
    with pytest.raises(CorruptSampleError, match="faults in a row"):
        loader(folder, "shard-{000008..000009}.tar").next()


def test_a_pattern_that_matches_nothing_is_refused_at_the_start(folder):
    Unindexed(f"{folder}/shard-{{000003..000009}}.tar", SAMPLES, CLASSES).check()
    for pattern in ("shard-{000008..000009}.tar", "*.tar", "shard-{0..", "${none}.tar", ""):
        with pytest.raises(ConfigError, match=r"data\.train = .*(shards exists|is not a pattern)"):
            Unindexed(f"{folder}/{pattern}", SAMPLES, CLASSES).check()


def test_impossible_settings_are_refused(folder):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 12"):
        loader(folder, world_size=5)
    with pytest.raises(ConfigError, match="no manifest"):
        Manifest.load(folder)
