"""Measure images per CPU-second against other loaders and an ideal, and the time until an epoch begins.

    pip install -e '.[benchmarks]' && python benchmarks/loader.py [--images 256] [--rounds 7]

The first part reads shards of JPEGs that are made from the photographs in the scikit-image and foolbox wheels and have
ImageNet's mean size in pixels. It runs in one process with one thread, alternates the variants and measures CPU
seconds. Crops are 224 pixels, of 5-100 % of the area. In the ideal, libjpeg-turbo decodes only the box and torch
resizes it; nothing is read, checked or drawn. DALI on the CPU takes part if it is installed. Goals:

- crop + flip: 1.85 times `webdataset` with Pillow and torchvision, and 0.82 of the ideal;
- RandAugment: 1.6 times `webdataset` with Pillow and torchvision.

The second part opens a manifest of ImageNet's 1,281,167 samples. It measures the seconds from a cold start to the rows
of any step (goal: under 1), and the memory of index and order in 4 ranks of 4 workers each (goal: under 100 MB per
node). The benchmark takes about 3 minutes.
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

SIZE = 224
AREA = (0.05, 1.0)
BATCH = 32
IMAGENET = 1_281_167  # samples
IMAGENET_SHARDS = 1024
GLOBAL_BATCH = 4096
RANKS = 4
WORKERS = 4
CROP = "crop + flip"
RANDAUGMENT = "crop + flip + RandAugment"


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
             {"of 1,281,167 samples": "only the manifest, s", "measured": load_s, "goal": None},
             *({"of 1,281,167 samples": f"MB per node: {what}", "measured": value, "goal": goal}
               for what, value, goal in memory)]
    print_table(other, f"Start and memory; a node with {RANKS} ranks of {WORKERS} workers")
    figures = {
        "crop_vs_webdataset_pil": rates[f"{CROP}: {OURS}"] / rates[f"{CROP}: {WDS}"],
        "randaugment_vs_webdataset_pil": rates[f"{RANDAUGMENT}: {OURS}"] / rates[f"{RANDAUGMENT}: {WDS}"],
        "resume_s": begin_s, "index_mb_per_node": memory[0][1], "images_per_cpu_s": rates[f"{CROP}: {OURS}"],
    }
    if f"{CROP}: {IDEAL}" in rates:
        figures["crop_vs_ideal"] = rates[f"{CROP}: {OURS}"] / rates[f"{CROP}: {IDEAL}"]
    record("loader", figures, [*rows, *other],
           f"JPEGs of {mean_bytes:,.0f} bytes on average. over webdataset: relative to webdataset + Pillow + "
           "torchvision in the same task. The ideal for RandAugment is that of crop + flip, since it costs nothing "
           "that is necessary. resume_s: median of 5 steps spread over 300 epochs. index_mb_per_node: growth of "
           f"the memory (PSS) of {RANKS} ranks and {RANKS * WORKERS} workers together since before they opened the "
           "index, with all of it read. "
           + ("" if dali() else "DALI was not installed."))


WDS = "webdataset + Pillow + torchvision"
OURS = "prelora_ds"
IDEAL = "ideal"


def task(name: str) -> str:
    return name.partition(":")[0]


def loaders(manifest: Manifest, folder: Path) -> dict[tuple[str, str], Callable[[], Iterator[int]]]:
    """Return functions by (task, name): each starts an epoch and yields the number of images of each batch."""
    urls = [manifest.shard_location(number) for number in range(len(manifest.shards))]
    variants: dict[tuple[str, str], Callable[[], Iterator[int]]] = {
        (CROP, OURS): lambda: ours(manifest, "none"),
        (CROP, WDS): lambda: webdataset(urls, torchvision_v1()),
        (CROP, "webdataset + torchvision decode_jpeg + v2"): lambda: webdataset(urls, torchvision_v2(), raw=True),
        (RANDAUGMENT, OURS): lambda: ours(manifest, "medium1"),
        (RANDAUGMENT, WDS): lambda: webdataset(urls, torchvision_v1(randaugment=True)),
    }
    if (box_decoder := compile_ideal(folder)) is not None:
        cuts = boxes(manifest)
        variants[CROP, IDEAL] = lambda: ideal(cuts, box_decoder)
    try:
        import timm  # noqa: F401
    except ImportError:
        print("timm is not installed: left out")
    else:
        (Path(manifest.folder) / "_info.json").write_text(json.dumps({}))
        variants[CROP, "timm's wds reader and transforms"] = lambda: timm_reader(manifest, None)
        variants[RANDAUGMENT, "timm's wds reader and transforms"] = lambda: timm_reader(
            manifest, "rand-m15-n2-mmax15")
    if dali():
        variants[CROP, "DALI on the CPU"] = dali_pipeline(manifest)
    else:
        print("DALI is not installed: left out")
    return variants


def cpu_seconds(make: Callable[[], Iterator[int]], images: int) -> float:
    """Return the CPU seconds of one epoch, scaled to ``images`` images."""
    started = time.process_time()
    done = 0
    for count in make():
        done += count
        if done >= images:
            break
    taken = time.process_time() - started
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
    """Return each image with a crop box drawn beforehand."""
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
    """Compile crop_decode.c to a function; None without a compiler or libjpeg-turbo's headers."""
    library = folder / "crop_decode.so"
    compiler = shutil.which("cc")
    command = [compiler or "", "-O2", "-shared", "-fPIC", str(ROOT / "benchmarks" / "crop_decode.c"), "-o",
               str(library), "-ljpeg"]
    if compiler is None or subprocess.run(command, capture_output=True).returncode != 0:
        print("no C compiler, or no libjpeg-turbo headers (apt-get install libjpeg-dev): the ideal is left out")
        return None
    function = ctypes.CDLL(str(library)).crop_decode
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_int] * 4, ctypes.c_void_p]
    # It must return exactly the pixels that decoding the whole image returns.
    buffer = io.BytesIO()
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(buffer, "JPEG")
    pixels = np.empty((90, 150, 3), np.uint8)
    assert function(buffer.getvalue(), len(buffer.getvalue()), 33, 71, 90, 150, pixels.ctypes.data) == 0
    assert np.array_equal(pixels, simplejpeg.decode_jpeg(buffer.getvalue())[33:123, 71:221])
    return function


def imagenet(folder: Path) -> None:
    """Write a manifest like ImageNet's; the shards are sparse files without data."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards = []
    rows = []
    first = 0
    for number, part in enumerate(np.array_split(np.arange(IMAGENET), IMAGENET_SHARDS)):
        shard_rows = np.zeros(len(part), ROW)
        shard_rows["length"] = rng.integers(20_000, 200_000, len(part))
        shard_rows["offset"] = np.concatenate([[0], shard_rows["length"].astype(np.int64).cumsum()[:-1]])
        shard_rows["label"] = rng.integers(1000, size=len(part))
        name, size = f"train-{number:06d}.tar", int(shard_rows["length"].sum(dtype=np.int64))
        with (folder / name).open("wb") as file:
            file.truncate(size)
        shards.append(Shard(name, size, len(part), 0, first))
        rows.append(shard_rows)
        first += len(part)
    save_manifest(folder, [str(label) for label in range(1000)], shards, rows)


def resume(folder: Path) -> tuple[float, float]:
    """Return (seconds until the rows of a step are known, seconds of these for the manifest).

    Both are medians over steps of a long run.
    """
    imagenet(folder)
    totals = []
    loads = []
    for epoch in (0, 37, 111, 203, 299):
        started = time.perf_counter()
        manifest = Manifest.load(folder)
        loads.append(time.perf_counter() - started)
        step = (epoch * IMAGENET + 777_777) // GLOBAL_BATCH
        rows = Stream(len(manifest), GLOBAL_BATCH).batch(epoch, step)
        totals.append(time.perf_counter() - started)
        assert rows.shape == (GLOBAL_BATCH, 2) and rows[0, 0] == epoch
    return median(totals), median(loads)


def index_memory(folder: Path) -> list[tuple[str, float, float | None]]:
    """Return (what, MB, goal) for a node, from the proportional set sizes of its processes."""
    context = multiprocessing.get_context("spawn")
    ranks = []
    workers = []
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
        pipe.send("measure")  # after all have opened it: they share its pages
    grown = [(pipe.recv() - was) / 1e6 for (_, pipe), was in zip(everyone, before, strict=True)]
    for process, pipe in everyone:
        pipe.send("end")
        process.join()
    return [("index and orders, all processes", sum(grown), 100.0),
            ("of these, ranks", sum(grown[:RANKS]), None), ("of these, workers", sum(grown[RANKS:]), None)]


def hold(folder: Path, pipe: Connection, rank: int | None) -> None:
    """Run as a rank with the order of an epoch, or as a worker (rank None); both read rows of the index."""
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
