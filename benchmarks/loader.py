"""How many images does a CPU-second give, against other loaders and the ideal; how soon does an epoch begin?

    pip install -e '.[benchmarks]' && python benchmarks/loader.py [--images 256] [--rounds 7]

Photographs of the scikit-image and foolbox wheels as JPEGs of ImageNet's mean size in pixels, in shards; one process of
one thread, all variants in turn, seconds of the CPU. Crops are 224 pixels, of 5-100 % of the area. Goals: crop + flip
1.85 times `webdataset` with Pillow and torchvision and 0.75 of the ideal (libjpeg-turbo decodes the box alone, torch
resizes it: nothing read, checked or drawn); RandAugment 1.6 times. DALI on the CPU joins where it is installed.

Then a manifest of ImageNet's 1,281,167 samples: seconds from nothing to the rows of any step (goal: under 1), and the
memory of its index and order in 4 ranks of 4 workers each (goal: under 100 MB a node). Takes about 3 minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from harness import ROOT, interleaved, print_table, record
from PIL import Image

from prelora_ds.data.datasets import ImagePipeline, rng_for
from prelora_ds.data.loader import TrainLoader
from prelora_ds.data.manifest import ROW, Manifest, Shard, save_manifest
from prelora_ds.data.order import Stream
from prelora_ds.data.shards.writer import PHOTOGRAPH_CLASSES, photographs, write_shards
from prelora_ds.data.transforms import inception_box, resize

SIZE, AREA, BATCH = 224, (0.05, 1.0), 32
IMAGENET, IMAGENET_SHARDS, GLOBAL_BATCH = 1_281_167, 1024, 4096
RANKS, WORKERS = 4, 4
CROP, RANDAUGMENT = "crop + flip", "crop + flip + RandAugment"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The image decoding")
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as base:
        folder = Path(base)
        manifest = write_shards(photographs(args.images), folder / "photographs", samples_per_shard=128,
                                class_names=PHOTOGRAPH_CLASSES)
        variants = {f"{task}: {name}": make for (task, name), make in loaders(manifest, folder).items()}
        seconds = interleaved({name: lambda make=make: cpu_seconds(make, args.images)
                               for name, make in variants.items()}, args.rounds)
        rates = {name: args.images / median(values) for name, values in seconds.items()}
        begin_s, load_s = resume(folder / "imagenet")
        memory = index_memory(folder / "imagenet")
        mean_bytes = float(manifest.rows["length"].mean())
    rows = [{"variant": name, "images per CPU-second": rate, "over webdataset": rate / rates[f"{task(name)}: {WDS}"],
             "ideal": rates.get(f"{CROP}: {IDEAL}"),
             "of ideal": rate / rates[f"{CROP}: {IDEAL}"] if f"{CROP}: {IDEAL}" in rates else None}
            for name, rate in rates.items()]
    print_table(rows, f"{args.images} JPEGs of {mean_bytes:,.0f} bytes, {args.rounds} rounds")
    other = [{"of 1,281,167 samples": "manifest, order and rows of a step, s", "measured": begin_s, "goal": 1.0},
             {"of 1,281,167 samples": "the manifest alone, s", "measured": load_s, "goal": None},
             *({"of 1,281,167 samples": f"MB a node: {what}", "measured": value, "goal": goal}
               for what, value, goal in memory)]
    print_table(other, f"Start and memory; a node of {RANKS} ranks of {WORKERS} workers")
    figures = {
        "crop_vs_webdataset_pil": rates[f"{CROP}: {OURS}"] / rates[f"{CROP}: {WDS}"],
        "randaugment_vs_webdataset_pil": rates[f"{RANDAUGMENT}: {OURS}"] / rates[f"{RANDAUGMENT}: {WDS}"],
        "resume_s": begin_s, "index_mb_per_node": memory[0][1], "images_per_cpu_s": rates[f"{CROP}: {OURS}"],
    }
    if f"{CROP}: {IDEAL}" in rates:
        figures["crop_vs_ideal"] = rates[f"{CROP}: {OURS}"] / rates[f"{CROP}: {IDEAL}"]
    record("loader", figures, [*rows, *other],
           f"JPEGs of {mean_bytes:,.0f} bytes on average. over webdataset: by webdataset + Pillow + torchvision in the "
           "same task. The ideal for RandAugment is that of crop + flip, for it costs nothing that is necessary. "
           f"resume_s: median of 5 steps spread over 300 epochs. index_mb_per_node: what {RANKS} ranks and "
           f"{RANKS * WORKERS} workers have together more than before they opened it (PSS), all of the index touched. "
           + ("" if dali() else "DALI was not installed."))


WDS, OURS, IDEAL = "webdataset + Pillow + torchvision", "prelora_ds", "ideal"


def task(name: str) -> str:
    return name.partition(":")[0]


def loaders(manifest: Manifest, folder: Path) -> dict[tuple[str, str], Callable[[], Iterator[int]]]:
    """(task, name) -> a function that starts an epoch over the data and yields the images of each batch."""
    urls = [manifest.shard_location(number) for number in range(len(manifest.shards))]
    found: dict[tuple[str, str], Callable[[], Iterator[int]]] = {
        (CROP, OURS): lambda: ours(manifest, "none"),
        (CROP, WDS): lambda: webdataset(urls, torchvision_v1()),
        (CROP, "webdataset + torchvision decode_jpeg + v2"): lambda: webdataset(urls, torchvision_v2(), raw=True),
        (RANDAUGMENT, OURS): lambda: ours(manifest, "medium1"),
        (RANDAUGMENT, WDS): lambda: webdataset(urls, torchvision_v1(randaugment=True)),
    }
    if (box_decoder := compile_ideal(folder)) is not None:
        cuts = boxes(manifest)
        found[CROP, IDEAL] = lambda: ideal(cuts, box_decoder)
    try:
        import timm  # noqa: F401
    except ImportError:
        print("timm is not installed: left out")
    else:
        (Path(manifest.folder) / "_info.json").write_text(json.dumps({}))
        found[CROP, "timm's wds reader and transforms"] = lambda: timm_reader(manifest, None)
        found[RANDAUGMENT, "timm's wds reader and transforms"] = lambda: timm_reader(
            manifest, "rand-m15-n2-mmax15")
    if dali():
        found[CROP, "DALI on the CPU"] = dali_pipeline(manifest)
    else:
        print("DALI is not installed: left out")
    return found


def cpu_seconds(make: Callable[[], Iterator[int]], images: int) -> float:
    """Of one epoch, in which every loader gives the same number of images."""
    begun, done = time.process_time(), 0
    for count in make():
        done += count
        if done >= images:
            break
    taken = time.process_time() - begun
    assert done >= images, f"{done} of {images} images"
    return taken * images / done


def ours(manifest: Manifest, level: Any) -> Iterator[int]:
    loader = TrainLoader(manifest, ImagePipeline(SIZE, 3, "inception", flip=True, augment=level, mixup=0.0), seed=0,
                         global_batch_size=BATCH, micro_batch_size=BATCH, rank=0, world_size=1, workers=0)
    try:
        while True:
            [batch] = loader.next()
            yield len(batch.images)
    finally:
        loader.close()


def torchvision_v1(randaugment: bool = False) -> Callable[[Any], Any]:
    from torchvision import transforms as t

    return t.Compose([t.RandomResizedCrop(SIZE, scale=AREA), t.RandomHorizontalFlip(),
                      *([t.RandAugment(2, 15)] if randaugment else []), t.ToTensor(),
                      t.Normalize([0.5] * 3, [0.5] * 3)])


def torchvision_v2() -> Callable[[bytes], Any]:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(SIZE, scale=AREA, antialias=True), v2.RandomHorizontalFlip()])
    return lambda data: transform(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8),
                                              mode=ImageReadMode.RGB))


def webdataset(urls: list[str], transform: Callable[[Any], Any], raw: bool = False) -> Iterator[int]:
    import webdataset as wds

    stream = wds.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(1000)
    stream = (stream if raw else stream.decode("pil")).to_tuple("jpg", "cls").map_tuple(transform, int)
    for images, _ in stream.batched(BATCH):
        yield len(images)


def timm_reader(manifest: Manifest, policy: str | None) -> Iterator[int]:
    from timm.data import create_dataset, create_transform

    split = f"shard-{{000000..{len(manifest.shards) - 1:06d}}}.tar|{len(manifest)}"
    data = create_dataset("wds/photographs", root=str(manifest.folder), split=split, is_training=True,
                          batch_size=BATCH)
    data.transform = create_transform(SIZE, is_training=True, scale=AREA, color_jitter=None, auto_augment=policy,
                                      interpolation="bilinear")
    images = []
    for image, _ in data:
        images.append(image)
        if len(images) == BATCH:
            torch.utils.data.default_collate(images)
            yield len(images)
            images = []


def dali() -> bool:
    try:
        from nvidia.dali import fn  # noqa: F401
    except ImportError:
        return False
    return True


def dali_pipeline(manifest: Manifest) -> Callable[[], Iterator[int]]:
    from nvidia.dali import fn, pipeline_def

    pictures = [np.frombuffer(data, np.uint8) for data in jpegs(manifest)]

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def pipeline() -> Any:
        data = fn.external_source(source=lambda info: pictures[info.idx_in_epoch % len(pictures)], batch=False)
        image = fn.decoders.image_random_crop(data, device="cpu", random_area=list(AREA),
                                              random_aspect_ratio=[3 / 4, 4 / 3])
        image = fn.resize(image, size=[SIZE, SIZE], antialias=True)
        return fn.flip(image, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()

    def epoch() -> Iterator[int]:
        while True:
            yield len(built.run()[0])

    return epoch


def jpegs(manifest: Manifest) -> list[bytes]:
    from prelora_ds.data.store import SampleStore

    store = SampleStore(manifest)
    return [bytes(store.read(sample)[0]) for sample in range(len(manifest))]


def boxes(manifest: Manifest) -> list[tuple[bytes, tuple[int, int, int, int]]]:
    """Each picture with a crop drawn beforehand."""
    cuts = []
    for number, data in enumerate(jpegs(manifest)):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        cuts.append((data, inception_box(height, width, rng_for(number))))
    return cuts


def ideal(cuts: list[tuple[bytes, tuple[int, int, int, int]]], crop_decode: Any) -> Iterator[int]:
    for start in range(0, len(cuts), BATCH):
        part = cuts[start:start + BATCH]
        images = torch.empty((len(part), 3, SIZE, SIZE), dtype=torch.uint8)
        for image, (data, (top, left, height, width)) in zip(images, part, strict=True):
            pixels = np.empty((height, width, 3), np.uint8)
            crop_decode(data, len(data), top, left, height, width, pixels.ctypes.data)
            image.copy_(resize(torch.from_numpy(pixels).permute(2, 0, 1), SIZE, SIZE))
        yield len(part)


def compile_ideal(folder: Path) -> Any:
    """crop_decode.c as a function, or None without a compiler and libjpeg-turbo's headers."""
    library = folder / "crop_decode.so"
    compiler = shutil.which("cc")
    command = [compiler or "", "-O2", "-shared", "-fPIC", str(ROOT / "benchmarks" / "crop_decode.c"), "-o",
               str(library), "-ljpeg"]
    if compiler is None or subprocess.run(command, capture_output=True).returncode != 0:
        print("no C compiler, or no libjpeg-turbo headers (apt-get install libjpeg-dev): the ideal is left out")
        return None
    function = ctypes.CDLL(str(library)).crop_decode
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_int] * 4, ctypes.c_void_p]
    # It gives the very pixels that decoding the whole picture gives: faster at no cost.
    buffer = io.BytesIO()
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(buffer, "JPEG")
    pixels = np.empty((90, 150, 3), np.uint8)
    assert function(buffer.getvalue(), len(buffer.getvalue()), 33, 71, 90, 150, pixels.ctypes.data) == 0
    assert np.array_equal(pixels, simplejpeg.decode_jpeg(buffer.getvalue())[33:123, 71:221])
    return function


def imagenet(folder: Path) -> None:
    """A manifest like ImageNet's; the shards are holes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards, rows, first = [], [], 0
    for number, part in enumerate(np.array_split(np.arange(IMAGENET), IMAGENET_SHARDS)):
        own = np.zeros(len(part), ROW)
        own["length"] = rng.integers(20_000, 200_000, len(part))
        own["offset"] = np.concatenate([[0], own["length"].astype(np.int64).cumsum()[:-1]])
        own["label"] = rng.integers(1000, size=len(part))
        name, size = f"train-{number:06d}.tar", int(own["length"].sum(dtype=np.int64))
        with (folder / name).open("wb") as file:
            file.truncate(size)
        shards.append(Shard(name, size, len(part), 0, first))
        rows.append(own)
        first += len(part)
    save_manifest(folder, [str(label) for label in range(1000)], shards, rows)


def resume(folder: Path) -> tuple[float, float]:
    """(seconds until the rows of a step are known, of which for the manifest): medians over steps of a long run."""
    imagenet(folder)
    whole, load = [], []
    for epoch in (0, 37, 111, 203, 299):
        begun = time.perf_counter()
        manifest = Manifest.load(folder)
        load.append(time.perf_counter() - begun)
        step = (epoch * IMAGENET + 777_777) // GLOBAL_BATCH
        rows = Stream(len(manifest), GLOBAL_BATCH).batch(epoch, step)
        whole.append(time.perf_counter() - begun)
        assert rows.shape == (GLOBAL_BATCH, 2) and rows[0, 0] == epoch
    return median(whole), median(load)


def index_memory(folder: Path) -> list[tuple[str, float, float | None]]:
    """(what, MB, goal) of a node, by its processes' proportional set sizes."""
    context = multiprocessing.get_context("spawn")
    ranks, workers = [], []
    for rank in range(RANKS):
        ends = [context.Pipe() for _ in range(1 + WORKERS)]
        for number, (_, end) in enumerate(ends):
            process = context.Process(target=hold, args=(folder, end, rank if number == 0 else None))
            process.start()
            end.close()
            (ranks if number == 0 else workers).append((process, ends[number][0]))
    everyone = [*ranks, *workers]
    before = [pipe.recv() for _, pipe in everyone]
    for _, pipe in everyone:
        pipe.send("open")
    for _, pipe in everyone:
        pipe.recv()
    for _, pipe in everyone:
        pipe.send("measure")  # when all have it: pages are shared by all
    grown = [(pipe.recv() - was) / 1e6 for (_, pipe), was in zip(everyone, before, strict=True)]
    for process, pipe in everyone:
        pipe.send("end")
        process.join()
    return [("index and orders, all processes", sum(grown), 100.0),
            ("of these, ranks", sum(grown[:RANKS]), None), ("of these, workers", sum(grown[RANKS:]), None)]


def hold(folder: Path, pipe: Connection, rank: int | None) -> None:
    """A rank with the order of an epoch, or a worker (rank None); both read rows of the index."""
    pipe.send(proportional_bytes())
    pipe.recv()
    manifest = Manifest.load(folder)
    if rank is not None:
        Stream(len(manifest), GLOBAL_BATCH).batch(0, 100 + rank)
    for sample in range(0, len(manifest), 100):
        manifest.index.row(sample)
    pipe.send("open")
    pipe.recv()
    pipe.send(proportional_bytes())
    pipe.recv()


def proportional_bytes() -> int:
    lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


if __name__ == "__main__":
    main()
