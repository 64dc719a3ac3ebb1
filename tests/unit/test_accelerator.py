"""Which accelerator a process uses. What needs a GPU to be seen is in tests/gpu."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prelora_ds.accelerator import (
    accelerator_fingerprint,
    choose_accelerator,
    driver_version,
    gpu_address,
    gpu_index,
    left_by_others,
    tell_deepspeed,
)
from prelora_ds.commands.export import export
from prelora_ds.errors import ConfigError

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("name", ["nvidiactl", "kfd"])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_a_run_on_the_cpu(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    environ: dict[str, str] = {}
    with pytest.raises(ConfigError, match=r"there is a GPU here, but torch .* cannot use it") as refused:
        choose_accelerator(environ, tmp_path)
    assert refused.value.value == str(tmp_path / name) and "DS_ACCELERATOR=cpu" in refused.value.remedy
    assert environ == {}


def test_gpus_of_the_batch_system_that_torch_cannot_use_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accelerator = 'SLURM_GPUS_ON_NODE=4'"):
        choose_accelerator({"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_GPUS": ""}, tmp_path)


@pytest.mark.parametrize("environ", [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {
    "CUDA_VISIBLE_DEVICES": "-1"}])
def test_a_run_on_the_cpu_that_was_asked_for_hides_the_gpus(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "nvidiactl").touch()
    choose_accelerator(environ, tmp_path)
    assert environ == {"DS_ACCELERATOR": "cpu", **NO_GPU}


def test_without_a_gpu_the_cpu_is_chosen_whatever_deepspeeds_launcher_sets(tmp_path: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "0"}
    choose_accelerator(environ, tmp_path)
    assert environ["DS_ACCELERATOR"] == "cpu"
    assert (accelerator_fingerprint(), gpu_address()) == ({"accelerator": "cpu"}, "")


def test_an_export_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DS_ACCELERATOR", *NO_GPU):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(ConfigError) as refused:
        export(tmp_path / "nowhere", tmp_path / "out")
    assert "nowhere" in str(refused.value) and os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(("local_rank", "seen", "index"), [(0, 4, 0), (3, 4, 3), (0, 1, 0), (3, 1, 0)])
def test_a_rank_uses_the_gpu_of_its_local_rank_or_the_only_one_that_it_sees(local_rank: int, seen: int, index: int,
                                                                           ) -> None:
    assert gpu_index(local_rank, seen) == index


def test_more_ranks_than_gpus_are_an_error() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK = 4: this process sees 2 GPUs"):
        gpu_index(4, 2)


@pytest.mark.parametrize("mpi", [{}, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}])
def test_deepspeed_learns_the_number_of_the_gpu_by_the_local_rank(mpi: dict[str, str]) -> None:
    environ = {"RANK": "7", "LOCAL_RANK": "3", **mpi}
    tell_deepspeed(0, environ)
    assert environ == {"RANK": "7", "LOCAL_RANK": "0", **dict.fromkeys(mpi, "0")}


@pytest.mark.parametrize(("free", "total", "left"), [(39.1, 39.5, 39.5), (38.4, 39.5, 38.0), (12.9, 79.2, 12.0)])
def test_memory_that_other_processes_hold_is_not_counted(free: float, total: float, left: float) -> None:
    assert left_by_others(free, total) == left


def test_the_version_of_the_driver_is_read(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert driver_version(path) == ""
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"
                    "GCC version: gcc version 12.3.0\n")
    assert driver_version(path) == "535.129.03"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert driver_version(path) == "580.65.06"
