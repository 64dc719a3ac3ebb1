"""`prelora shards`: build, index and verify shards, and write two sets of real images.

The two sets (digits, photographs) need no download.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prelora_ds.commands.output import refuse_url, tell
from prelora_ds.errors import ConfigError

if TYPE_CHECKING:
    from prelora_ds.data.manifest import Manifest

shards_app = typer.Typer(
    no_args_is_help=True, help="Write, index and check WebDataset shards with a manifest."
)

# (rank, world size) of each launcher. SLURM_NTASKS is not used: a batch script has it too, with
# SLURM_PROCID, and is not a task of srun.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

Source = Annotated[
    Path, typer.Argument(help="folder or archive with the images", show_default=False)
]
Out = Annotated[Path, typer.Argument(help="new folder to write", show_default=False)]
Images = Annotated[int, typer.Option(min=1, help="number of images in this split")]
ShortSide = Annotated[int, typer.Option(min=1, help="pixels of the short side")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the order, or of the cuts")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="number of samples per shard")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="number of worker processes (default: all usable cores)")
]
LabelKey = Annotated[
    str | None,
    typer.Option(
        help="name of the label field in .json members; .cls is then ignored "
        "(default: .cls, otherwise the field `label`)"
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(help="reuse the class list of these shards (for val: the train shards)"),
]


def rank_and_world_size(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (rank, world size) from the variables of mpiexec, srun or torchrun.

    It is (0, 1) if none of them started this process. Raises ConfigError for an impossible rank.
    """
    for rank_name, size_name in _LAUNCHERS:
        if rank_name not in environ or size_name not in environ:
            continue
        texts = environ[rank_name], environ[size_name]
        rank, size = map(int, texts) if all(map(str.isdecimal, texts)) else (0, 0)
        if not 0 <= rank < size:
            raise ConfigError(
                "environment",
                f"{rank_name}={texts[0]} {size_name}={texts[1]}",
                "is not a valid rank",
                "unset the variables that an earlier launcher left behind",
            )
        return rank, size
    return 0, 1


@shards_app.command()
def digits(out: Out, samples_per_shard: SamplesPerShard = 512) -> None:
    """Write scikit-learn's digits (1,797 real 8x8 images) to OUT/train and OUT/val.

    Example: prelora shards digits data/digits
    """
    from prelora_ds.data.shards import writer

    refuse_url(out, "OUT")
    for split, manifest in writer.write_digits(out, samples_per_shard).items():
        tell(f"{out / split}: {len(manifest)} samples in {len(manifest.shards)} shards")


@shards_app.command()
def photographs(
    out: Out,
    train: Images = 256,
    val: Images = 64,
    short_side: ShortSide = 384,
    seed: Seed = 0,
    samples_per_shard: SamplesPerShard = 128,
) -> None:
    """Write JPEGs cut from real photographs to OUT/train and OUT/val.

    The photographs come with the scikit-image and foolbox wheels; the labels are ImageNet's.

    Example: prelora shards photographs data/photographs
    """
    from prelora_ds.data.shards import writer

    refuse_url(out, "OUT")
    samples = {
        split: writer.photographs(count, seed + (split == "val"), short_side)
        for split, count in zip(writer.SPLITS, (train, val), strict=True)
    }
    made = writer.write_splits(
        samples, out, samples_per_shard=samples_per_shard, class_names=writer.PHOTOGRAPH_CLASSES
    )
    for split, manifest in made.items():
        tell(f"{out / split}: {len(manifest)} samples in {len(manifest.shards)} shards")


@shards_app.command()
def build(
    source: Source,
    out: Out,
    source_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="imagefolder, ilsvrc2012, cifar, huggingface or idx (default: detected)",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="which split, if the source has several")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="labels for ilsvrc2012's val: the devkit, or a file of lines `IMAGE WNID`, such "
            "as LOC_val_solution.csv"
        ),
    ] = None,
    like: Like = None,
    resize_short: Annotated[
        int | None,
        typer.Option(min=1, help="resize the short side to this many pixels and re-encode as JPEG"),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="JPEG quality for --resize-short (default: 90)")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="leave out images that cannot be read; count and list them"
        ),
    ] = False,
    samples_per_shard: SamplesPerShard = 1024,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Write the images of SOURCE to shards in the new folder OUT, shuffled by seed.

    Start it under mpiexec or srun to use several hosts. JPEG, PNG and WebP keep their bytes unless
    --resize-short makes them smaller. After a kill, the same command continues where it stopped.

    Example: prelora shards build imagenet/train data/train
    """
    from prelora_ds.data.parallel import usable_cores
    from prelora_ds.data.shards import build_shards as building
    from prelora_ds.data.shards.build_plan import Options
    from prelora_ds.data.shards.sources.listing import Request
    from prelora_ds.reporting.progress import CountProgress

    refuse_url(out, "OUT")
    if quality is not None and resize_short is None:
        raise ConfigError(
            "--quality",
            quality,
            "applies only with --resize-short",
            "give both, or neither",
        )
    rank, world_size = rank_and_world_size(os.environ)
    options = Options(samples_per_shard, seed, resize_short, quality or Options.quality, skip_bad)
    with CountProgress("shards", shown=rank == 0) as progress:
        manifest = building.build(
            Request(source, split, labels),
            out,
            options,
            source_format=source_format,
            like=like,
            workers=workers or usable_cores(),
            rank=rank,
            world_size=world_size,
            progress=progress.show,
            say=progress.say,
        )
    if manifest is not None:
        name = os.fsencode(out).decode(errors="replace")  # the name may not be UTF-8
        tell(f"{name}: {_counts(manifest)}")


@shards_app.command()
def verify(
    folder: Annotated[
        str, typer.Argument(help="folder of shards with a manifest, or its URL", show_default=False)
    ],
    decode: Annotated[bool, typer.Option("--decode", help="also decode every image")] = False,
    workers: Workers = None,
) -> None:
    """Verify every byte of the shards in FOLDER, a path or a URL, against the manifest.

    With --decode, also list every image that training could not decode. Exits with 1 if there is a
    problem.

    Example: prelora shards verify data/digits/train --decode
    """
    from prelora_ds.data.parallel import usable_cores
    from prelora_ds.data.shards import verify as check
    from prelora_ds.reporting.progress import CountProgress

    with CountProgress("shards", shown=True) as progress:
        problems = check.verify(
            folder, decode=decode, workers=workers or usable_cores(), progress=progress.show
        )
    for problem in problems:
        typer.echo(f"{folder}: {problem}")
    if problems:
        typer.echo(f"{folder}: {len({problem.shard for problem in problems})} shards have problems")
        raise typer.Exit(1)
    decoded = ", and every image can be decoded" if decode else ""
    typer.echo(f"{folder}: all shards match the manifest{decoded}")


@shards_app.command()
def index(
    source: Annotated[
        str,
        typer.Argument(
            help="folder of shards, or a pattern such as URL/train-{0000..1023}.tar",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="where to write the manifest (default: next to the shards)")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="file with one class name per line"),
    ] = None,
    like: Like = None,
    label_key: LabelKey = None,
    workers: Workers = None,
) -> None:
    """Create a manifest for existing shards: a folder or a pattern, URL/train-{0000..1023}.tar.

    A sample is an image (.jpg, .jpeg, .png, .webp) and a label in .cls or .json. Pickled members
    are never decoded.

    Example: prelora shards index data/train-{0000..1023}.tar --out data/train
    """
    from prelora_ds.data.labels import read_classes
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.parallel import usable_cores
    from prelora_ds.data.shards import index as indexing
    from prelora_ds.reporting.progress import CountProgress

    refuse_url(out, "--out")
    if classes is not None and like is not None:
        raise ConfigError(
            "--classes", str(classes), "--like provides the classes as well", "give one of the two"
        )
    names = None
    if like is not None:
        names = Manifest.load(like, "--like", sizes=False).classes
    elif classes is not None:
        names = read_classes(classes)
    with CountProgress("shards", shown=True) as progress:
        made = indexing.index(
            source,
            out,
            classes=names,
            label_key=label_key,
            workers=workers or usable_cores(),
            progress=progress.show,
        )
    if made.pickled:
        typer.echo(
            f"{source}: {made.pickled} pickled members were skipped (never decoded)", err=True
        )
    if made.skipped:
        typer.echo(
            f"{source}: {made.skipped} members that belong to no sample were skipped; "
            f"the first is {made.example!r}",
            err=True,
        )
    tell(f"{made.manifest.index_file.parent}: {_counts(made.manifest)}")


def _counts(manifest: Manifest) -> str:
    """Return the numbers of samples, classes and shards, and of classes without a sample.

    For example, labels that count from 1 leave class 0 without a sample.
    """
    import numpy as np

    classes = len(manifest.classes)
    empty = classes - len(np.unique(manifest.rows["label"]))
    without = f"; {empty} classes have no sample" if empty else ""
    return f"{len(manifest)} samples of {classes} classes in {len(manifest.shards)} shards{without}"
