"""Images that cannot be read are all told at once, and left out where that is asked for."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from prelora_ds.data.manifest import Manifest
from prelora_ds.data.shards import build_shards as building
from prelora_ds.data.shards.build_plan import Options
from prelora_ds.data.shards.build_shards import build
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError, DiskError

OPTIONS = Options(samples_per_shard=8, seed=3)
SKIP = Options(samples_per_shard=8, seed=3, skip_bad=True)
BAD = (3, 11, 17, 18, 30)
IMAGES = 40


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def plant(root, bad=BAD):
    for number in range(IMAGES):
        path = root / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number in bad else picture(number))
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def images(manifest):
    """The bytes of all images in the shards."""
    found = set()
    for shard in manifest.shards:
        with tarfile.open(manifest.folder / shard.name) as tar:
            found |= {
                tar.extractfile(name).read() for name in tar.getnames() if name.endswith("jpg")
            }
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_images_are_listed_in_one_go_and_repaired_in_the_next(tmp_path, workers):
    source = plant(tmp_path / "in")
    whole = build(Request(plant(tmp_path / "whole", bad=())), tmp_path / "expected", OPTIONS)
    with pytest.raises(ConfigError, match="5 images cannot be read") as refused:
        build(Request(source), tmp_path / "out", OPTIONS, workers=workers)
    partial = tmp_path / "out.partial"
    for number in BAD:
        assert (
            str(refused.value).count(f"/{number}.jpg: not an image (it begins with b'broken'") == 1
        )
    assert "--skip-bad" in str(refused.value)
    kept = {path.name: path.stat().st_ino for path in partial.glob("shard-*.tar")}
    listed = (partial / "bad-images.txt").read_text().splitlines()
    assert len(listed) == 5 and 0 < len(kept) < 5
    plant(source, bad=BAD[:1])
    with pytest.raises(ConfigError, match=r"SOURCE = .*/3\.jpg'.*cannot be read"):
        build(Request(source), tmp_path / "out", OPTIONS, workers=workers)
    plant(source, bad=())
    manifest = build(Request(source), tmp_path / "out", OPTIONS, workers=workers)
    assert contents(manifest.folder) == contents(whole.folder)
    assert all((manifest.folder / name).stat().st_ino == number for name, number in kept.items())


def test_a_long_list_is_cut_with_its_count_and_kept_whole_in_a_file(tmp_path):
    source = plant(tmp_path / "in", bad=range(30))
    with pytest.raises(ConfigError, match="30 images cannot be read") as refused:
        build(Request(source), tmp_path / "out", OPTIONS)
    lines = str(refused.value).splitlines()
    assert sum(".jpg: not an image" in line for line in lines) == 20 and "  and 10 more" in lines
    assert len((tmp_path / "out.partial" / "bad-images.txt").read_text().splitlines()) == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_bad_leaves_them_out_and_counts_and_lists_them(tmp_path, workers):
    said = []
    source = plant(tmp_path / "in")
    manifest = build(Request(source), tmp_path / "out", SKIP, workers=workers, say=said.append)
    assert len(manifest) == IMAGES - 5 and manifest.classes == ("class0", "class1")
    assert images(manifest) == {picture(number) for number in range(IMAGES) if number not in BAD}
    listed = (tmp_path / "out" / "bad-images.txt").read_text()
    assert all(f"/{number}.jpg: not an image" in listed for number in BAD)
    assert "left out 5 of 40 images" in said[-1] and "/17.jpg" in said[-1]
    assert Manifest.load(tmp_path / "out").rows["label"].sum() == 20 - sum(n % 2 for n in BAD)


def test_a_build_that_stopped_at_bad_images_continues_with_skip_bad(tmp_path):
    source = plant(tmp_path / "in")
    with pytest.raises(ConfigError, match="5 images"):
        build(Request(source), tmp_path / "out", OPTIONS)
    kept = {p.name: p.stat().st_ino for p in (tmp_path / "out.partial").glob("shard-*.tar")}
    manifest = build(Request(source), tmp_path / "out", SKIP)
    assert kept and all((manifest.folder / n).stat().st_ino == ino for n, ino in kept.items())
    assert contents(manifest.folder) == contents(
        build(Request(source), tmp_path / "new", SKIP).folder
    )


def test_a_resumed_build_agrees_about_skip_bad(tmp_path):
    source = plant(tmp_path / "in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "PATIENCE_S", 0.2)
        with pytest.raises(building.StalledError):  # the other rank never comes
            build(Request(source), tmp_path / "out", SKIP, world_size=2)
    with pytest.raises(ConfigError, match=r"--skip-bad = False.*has True"):
        build(Request(source), tmp_path / "out", OPTIONS)
    plant(source, bad=())  # what is written stays as it is
    assert len(build(Request(source), tmp_path / "out", SKIP)) < IMAGES


def test_the_images_that_other_ranks_could_not_read_are_reported_by_rank_0(tmp_path):
    source = plant(tmp_path / "in")
    plan = tmp_path / "out.partial" / "work" / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "PATIENCE_S", 0.2)
        with pytest.raises(building.StalledError):
            build(Request(source), tmp_path / "out", OPTIONS, world_size=2)
    assert plan.exists()
    assert build(Request(source), tmp_path / "out", OPTIONS, rank=1, world_size=2) is None
    with pytest.raises(ConfigError, match="5 images cannot be read"):
        build(Request(source), tmp_path / "out", OPTIONS, world_size=2)


def test_a_shard_of_only_bad_images_is_left_out_and_a_source_of_them_is_refused(tmp_path):
    one = Options(samples_per_shard=1, seed=3, skip_bad=True)
    manifest = build(Request(plant(tmp_path / "in")), tmp_path / "out", one)
    assert len(manifest.shards) == len(manifest) == IMAGES - 5
    source = plant(tmp_path / "none", bad=range(IMAGES))
    with pytest.raises(ConfigError, match="none of the 40 images can be read"):
        build(Request(source), tmp_path / "out2", one)


def test_files_that_are_gone_or_empty_are_bad_images_and_a_source_that_is_gone_is_not(tmp_path):
    source = plant(tmp_path / "in", bad=())
    (source / "class0" / "0.jpg").unlink()
    (source / "class0" / "0.jpg").symlink_to("nowhere")
    (source / "class0" / "2.jpg").write_bytes(b"")
    with pytest.raises(ConfigError) as refused:
        build(Request(source), tmp_path / "out", OPTIONS)
    assert "0.jpg: No such file or directory" in str(refused.value)
    assert "2.jpg: not an image (it is empty)" in str(refused.value)
    source.rename(tmp_path / "moved")
    with pytest.raises(DiskError) as failed:
        build(Request(source), tmp_path / "out", SKIP)
    assert failed.value.exit_code == 75


def test_a_disk_that_fails_is_never_a_bad_image(tmp_path):
    """/proc/self/mem gives an EIO for what is not mapped, as a failing disk does."""
    source = plant(tmp_path / "in", bad=())
    (source / "class0" / "0.jpg").unlink()
    (source / "class0" / "0.jpg").symlink_to("/proc/self/mem")
    with pytest.raises(DiskError, match=r"0\.jpg.*Input/output error") as failed:
        build(Request(source), tmp_path / "out", SKIP)
    assert failed.value.exit_code == 75


def test_images_in_tables_and_archives_are_named_by_their_place(tmp_path):
    def member(out, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as out:
        member(out, "n01440764_1.JPEG", picture(1))
        member(out, "n01440764_2.JPEG", b"broken")
    with tarfile.open(tmp_path / "train.tar", "w") as out:
        member(out, "n01440764.tar", inner.getvalue())
    with pytest.raises(ConfigError, match=r"train\.tar, member n01440764_2\.JPEG at byte \d+"):
        build(Request(tmp_path / "train.tar"), tmp_path / "out", OPTIONS)
    import pyarrow as pa
    import pyarrow.parquet

    column = [
        {"bytes": picture(0), "path": None},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "/dev/zero"},
    ]
    (tmp_path / "table").mkdir()
    path = tmp_path / "table" / "train.parquet"
    pa.parquet.write_table(pa.table({"image": column, "label": [0, 1, 1]}), path)
    with pytest.raises(ConfigError) as refused:
        build(Request(tmp_path / "table"), tmp_path / "out2", OPTIONS)
    assert f"{path}, image 1: no image in this row" in str(refused.value)
    assert f"{path}, image 2: a pipe or a device" in str(refused.value)


def run(*arguments, **environ):
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD_SIZE", "OMPI_", "PMI", "SLURM_"))
    }
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from prelora_ds.cli import main; main()",
            "shards",
            "build",
            *map(str, arguments),
            "--workers",
            "1",
        ],
        env=clean | environ,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_the_command_reports_what_it_skipped_and_left_out(tmp_path):
    source = plant(tmp_path / "in")
    (source / ".ipynb_checkpoints").mkdir()
    done = run(source, tmp_path / "out", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "skipped: the hidden folders .ipynb_checkpoints" in done.stderr
    assert "left out 5 of 40 images" in done.stderr and "35 samples" in done.stdout
    done = run(source, os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"), "--skip-bad")
    assert done.returncode == 0, done.stderr
    done = run(source, tmp_path / "out2")
    assert done.returncode == 2 and "5 images cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
