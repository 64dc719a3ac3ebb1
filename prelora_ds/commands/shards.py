"""`prelora shards`: build, index, verify; and two sets of real images that need no download."""

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

# (rank, world size) of one launcher. A batch script has SLURM_PROCID and SLURM_NTASKS too, but is no task of srun.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

AtLeast1 = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int, typer.Option(min=0)]
SamplesPerShard = AtLeast1
Workers = Annotated[
    int | None, typer.Option(min=1, help="processes; as many as this process may use cores, else")
]
LabelKey = Annotated[
    str | None,
    typer.Option(
        help="of the label in .json; .cls is then not looked at. Without it: .cls, or .json's `label`"
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(help="a folder of shards whose classes to take (for val: those of train)"),
]


def rank_and_world_size(environ: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world size) as mpiexec, srun or torchrun tell it; (0, 1) where none of them started this process."""
    for rank, world_size in _LAUNCHERS:
        if rank in environ and world_size in environ:
            said = environ[rank], environ[world_size]
            numbers = all(text.isdecimal() for text in said)
            place = (int(said[0]), int(said[1])) if numbers else (0, 0)
            if not 0 <= place[0] < place[1]:
                told = f"{rank}={said[0]} {world_size}={said[1]}"
                raise ConfigError(
                    "environment",
                    told,
                    "is not a rank of a job",
                    "unset what a former launcher left behind",
                )
            return place
    return 0, 1


@shards_app.command()
def digits(out: Path, samples_per_shard: SamplesPerShard = 512) -> None:
    """Write scikit-learn's digits (1,797 real 8x8 images) to OUT/train and OUT/val."""
    from prelora_ds.data.shards import writer

    refuse_url(out, "OUT")
    for split, manifest in writer.write_digits(out, samples_per_shard).items():
        tell(f"{out / split}: {len(manifest)} samples in {len(manifest.shards)} shards")


@shards_app.command()
def photographs(
    out: Path,
    train: AtLeast1 = 256,
    val: AtLeast1 = 64,
    short_side: AtLeast1 = 384,
    seed: Seed = 0,
    samples_per_shard: SamplesPerShard = 128,
) -> None:
    """Write JPEGs cut from the photographs of the scikit-image and foolbox wheels, labelled as in ImageNet."""
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
    source: Path,
    out: Path,
    source_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="imagefolder, ilsvrc2012, cifar, huggingface or idx; found out by looking, else",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="of a source that has several")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="of ilsvrc2012's val: the devkit, or a file of "
            "lines `IMAGE WNID`, such as "
            "LOC_val_solution.csv"
        ),
    ] = None,
    like: Like = None,
    resize_short: Annotated[
        int | None, typer.Option(min=1, help="pixels of the short side; JPEG again")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="of --resize-short's JPEGs [90]")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="leave out, count and list images that cannot be read"),
    ] = False,
    samples_per_shard: SamplesPerShard = 1024,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Write the images of SOURCE, shuffled by seed, to the new folder OUT; on many hosts under mpiexec or srun.

    Bytes are untouched without --resize-short. After a kill, the same command continues where it
    stopped.
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
            "bytes stay untouched without --resize-short",
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
        name = os.fsencode(out).decode(errors="replace")  # a name need not be UTF-8
        tell(f"{name}: {_counts(manifest)}")


@shards_app.command()
def verify(
    folder: str,
    decode: Annotated[bool, typer.Option("--decode", help="decode every image too")] = False,
    workers: Workers = None,
) -> None:
    """Find every cut and every flipped bit in the shards of FOLDER, a path or a URL.

    With --decode also every image that training could not decode. Exit code 1 if there is any.
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
    typer.echo(f"{folder}: every shard is as in the manifest{decoded}")


@shards_app.command()
def index(
    source: str,
    out: Annotated[
        Path | None, typer.Option(help="folder of the manifest; beside the shards, else")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="a file with a class name a line"),
    ] = None,
    like: Like = None,
    label_key: LabelKey = None,
    workers: Workers = None,
) -> None:
    """Make the manifest of shards that others wrote: a folder or a pattern like URL/train-{0000..1023}.tar.

    Samples are an image (.jpg, .jpeg, .png, .webp) and a label, in .cls or .json. Nothing pickled is ever decoded.
    """
    from prelora_ds.data.labels import read_classes
    from prelora_ds.data.manifest import Manifest
    from prelora_ds.data.parallel import usable_cores
    from prelora_ds.data.shards import index as indexing
    from prelora_ds.reporting.progress import CountProgress

    refuse_url(out, "--out")
    if classes is not None and like is not None:
        raise ConfigError(
            "--classes", str(classes), "--like names the classes too", "give one of them"
        )
    names = (
        Manifest.load(like, "--like", sizes=False).classes
        if like is not None
        else read_classes(classes)
        if classes is not None
        else None
    )
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
            f"{source}: {made.pickled} pickled members were passed over, and not decoded", err=True
        )
    if made.skipped:
        typer.echo(
            f"{source}: {made.skipped} members that belong to no sample were passed "
            f"over; the first is {made.example!r}",
            err=True,
        )
    tell(f"{made.manifest.index_file.parent}: {_counts(made.manifest)}")


def _counts(manifest: Manifest) -> str:
    """Samples, classes and shards, and how many classes have no sample: labels that count from 1 leave out 0, say."""
    import numpy as np

    classes = len(manifest.classes)
    empty = classes - len(np.unique(manifest.rows["label"]))
    without = f"; {empty} classes have no sample" if empty else ""
    return f"{len(manifest)} samples of {classes} classes in {len(manifest.shards)} shards{without}"
