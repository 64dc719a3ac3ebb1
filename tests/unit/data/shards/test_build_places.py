"""A build begins, continues and ends at the right place, or is refused in one message."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from prelora_ds.data.shards.build_plan import Options
from prelora_ds.data.shards.build_shards import build
from prelora_ds.data.shards.sources.listing import Request
from prelora_ds.errors import ConfigError

OPTIONS = Options(samples_per_shard=8, seed=3)
BAD = (3, 11, 17, 18, 30)
IMAGES = 40


def picture(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def plant(root, bad=()):
    for number in range(IMAGES):
        path = root / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if number in bad else picture(number))
    return root


def start(*arguments, **environ):
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RANK", "WORLD_SIZE", "OMPI_", "PMI", "SLURM_"))
    }
    build_command = "from prelora_ds.cli import main; main()", "shards", "build"
    return subprocess.Popen(
        [sys.executable, "-c", *build_command, *map(str, arguments), "--workers", "1"],
        env=clean | environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*arguments, **environ):
    """(exit code, stderr) of the command."""
    process = start(*arguments, **environ)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr


def test_a_build_continues_from_another_folder_and_by_another_path(tmp_path, monkeypatch):
    plant(tmp_path / "in", BAD[:1])
    monkeypatch.chdir(tmp_path)
    relative = Request(type(tmp_path)("in"))
    with pytest.raises(ConfigError, match="cannot be read"):
        build(relative, type(tmp_path)("out"), OPTIONS)
    plan = json.loads((tmp_path / "out.partial" / "work" / "plan.json").read_text())
    assert all(file.startswith(f"{tmp_path.resolve()}/in/") for file in plan["files"])
    plant(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir("/")
    assert len(build(Request(tmp_path / "link"), tmp_path / "out", OPTIONS)) == IMAGES


def test_a_source_inside_of_out_and_out_inside_of_the_source_are_refused(tmp_path):
    source = plant(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    for out in (source, tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigError, match="SOURCE is inside of it") as refused:
            build(Request(source), out, OPTIONS)
        assert "remove" not in refused.value.remedy
    for out in (source / "out", source / "class0" / "deep" / "out", tmp_path / "link" / "out"):
        with pytest.raises(ConfigError, match="it is inside of SOURCE"):
            build(Request(source), out, OPTIONS)
    (tmp_path / "x.partial").mkdir()
    source.rename(tmp_path / "x.partial" / "in")
    with pytest.raises(ConfigError, match="SOURCE is inside of it"):
        build(Request(tmp_path / "x.partial" / "in"), tmp_path / "x", OPTIONS)
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 1


def test_a_folder_of_the_name_of_a_partial_build_is_not_touched(tmp_path):
    source, mine = plant(tmp_path / "in"), tmp_path / "out.partial" / ".mine"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(ConfigError, match=r"not an unfinished build, it contains '\.mine'"):
        build(Request(source), tmp_path / "out", OPTIONS)
    assert mine.read_text() == "keep"


@pytest.mark.parametrize("out", ["/", "..", "file/out", "x" * 250, "dangling", "/proc/out"])
def test_an_out_that_cannot_be_is_one_message(tmp_path, out, monkeypatch):
    source = plant(tmp_path / "in")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"OUT = ") as refused:
        build(Request(source), type(tmp_path)(out), OPTIONS)
    assert refused.value.exit_code == 2


def test_all_ranks_end_at_once_where_rank_0_refuses_the_source(tmp_path):
    source = plant(tmp_path / "in")
    (source / "empty").mkdir()
    began = time.monotonic()
    ranks = [start(source, tmp_path / "out", RANK=str(rank), WORLD_SIZE="3") for rank in (1, 2, 0)]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 2] and "has no images" in said[2]
    assert time.monotonic() - began < 60
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["plan.json", "items.npy", "000000.npz"])
def test_a_damaged_work_folder_is_one_message(tmp_path, name):
    source = plant(tmp_path / "in", BAD)
    with pytest.raises(ConfigError, match="5 images"):
        build(Request(source), tmp_path / "out", OPTIONS)
    work = tmp_path / "out.partial" / "work"
    (work / name).write_bytes(b"{" + bytes(100))
    plant(source)
    with pytest.raises(ConfigError, match=r"is damaged.*\n.*remove"):
        build(Request(source), tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    "hostile",
    [
        ["--like", "/dev/null"],
        ["--like", "/"],
        ["--split", "../x"],
        ["--split", ""],
        ["--labels", "/"],
        ["--seed", "-1"],
        ["--format", "zip"],
        ["--quality", "7"],
    ],
)
def test_hostile_options_end_with_2_and_one_message(tmp_path, hostile):
    code, stderr = run(plant(tmp_path / "in"), tmp_path / "out", *hostile)
    assert code == 2 and "Traceback" not in stderr, stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("place", ["x", "-1", "1.0", "", "\u0661"])
def test_a_rank_that_is_not_a_number_is_one_message(tmp_path, place):
    code, stderr = run(plant(tmp_path / "in"), tmp_path / "out", RANK=place, WORLD_SIZE="1")
    assert code == 2 and "is not a valid rank" in stderr, stderr
