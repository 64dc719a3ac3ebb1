"""Ranks from the environments of launchers.

Those of Open MPI 5, MPICH 4 and Slurm 22.05 were printed by the real launchers; PALS and Intel MPI follow the
manuals.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.discovery import DEFAULT_PORT, Ranks, ranks_from_environment

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a"}
DEEPSPEED = TORCH | {"LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_PORT": "29501"}
TORCHRUN = TORCH | {"LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_PORT": "29501"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "8",
           "PMIX_RANK": "5", "PMIX_HOSTNAME": "b", "PRTE_LAUNCHED": "1"}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
INTEL = MPICH | {"I_MPI_ROOT": "/opt/intel/mpi", "MPIR_CVAR_CH4_OFI_ENABLE": "1"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4", "PALS_RANKID": "5",
        "PALS_LOCAL_RANKID": "1", "PALS_NODEID": "1", "PALS_APID": "9f7c", "PBS_JOBID": "123456.polaris-pbs-01",
        "PBS_NODEFILE": "/var/spool/pbs/aux/123456"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[08-09]", "SLURM_NODELIST": "n[08-09]", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}
SRUN = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "n[08-09]",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
# mpirun in a Slurm job: srun starts one daemon a node, and its variables reach the ranks.
DAEMON = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1",
                 "SLURM_LOCALID": "0"}
JOB_PORT = 20077


def mistake(environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        ranks_from_environment(environ)
    assert caught.value.key == "environment"
    return caught.value


@pytest.mark.parametrize(("environ", "local_size", "master", "port", "source"), [
    (TORCH, None, "a", DEFAULT_PORT, "torch"), (DEEPSPEED, 4, "a", 29501, "torch"), (TORCHRUN, 4, "a", 29501, "torch"),
    (OPENMPI, 4, None, DEFAULT_PORT, "openmpi"), (OPENMPI | {"MASTER_ADDR": "h"}, 4, "h", DEFAULT_PORT, "openmpi"),
    (MPICH, 4, None, DEFAULT_PORT, "pmi"), (INTEL, 4, None, DEFAULT_PORT, "pmi"), (PALS, 4, None, 23456, "pmi"),
    (SRUN, 4, "n08", JOB_PORT, "slurm"), (SRUN | PALS, 4, "n08", JOB_PORT, "slurm"),
    (BATCH | DEEPSPEED, 4, "a", 29501, "torch"),
    (DAEMON | OPENMPI, 4, "n08", JOB_PORT, "openmpi"), (DAEMON | MPICH, 4, "n08", JOB_PORT, "pmi"),
    (DAEMON | TORCHRUN, 4, "a", 29501, "torch"),
    (SRUN | {"WORLD_SIZE": "8", "MASTER_ADDR": "m"}, 4, "m", JOB_PORT, "slurm"),
])
def test_rank_5_of_8_is_detected_under_every_launcher(environ, local_size, master, port, source) -> None:
    assert ranks_from_environment(environ) == Ranks(5, 1, 8, local_size, master, port, source)


def test_the_master_of_a_pbs_job_is_the_first_line_of_its_node_file() -> None:
    assert ranks_from_environment(PALS, "x3001\nx3002\n").master_addr == "x3001"


def test_ranks_on_one_host_meet_on_loopback() -> None:
    alone = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    assert ranks_from_environment(alone).master_addr == "127.0.0.1"
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    assert ranks_from_environment(single).world_size == 1


@pytest.mark.parametrize("missing", [["RANK"], ["LOCAL_RANK"], ["WORLD_SIZE"], ["RANK", "WORLD_SIZE"],
                                     ["RANK", "LOCAL_RANK", "WORLD_SIZE"]])
def test_missing_variables_are_named_with_the_command_that_starts_a_run(missing: list[str]) -> None:
    error = mistake({key: value for key, value in TORCH.items() if key not in missing})
    assert error.value == ", ".join(key for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if key in missing)
    assert "was not started by a launcher" in error.problem and "deepspeed launch/pretrain.py" in error.remedy


def test_a_batch_script_is_not_taken_for_a_rank() -> None:
    assert "this is the batch script itself" in mistake(BATCH).problem


def test_torch_without_a_master_is_refused() -> None:
    assert mistake({k: v for k, v in DEEPSPEED.items() if k != "MASTER_ADDR"}).value == "MASTER_ADDR"


@pytest.mark.parametrize("key", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("text", ["", "one", "1.5"])
def test_a_rank_that_is_not_an_integer_is_refused(key: str, text: str) -> None:
    error = mistake(TORCH | {key: text})
    assert error.problem == "is not an integer" and error.value == {key: text}


@pytest.mark.parametrize("invalid", [{"RANK": "8"}, {"WORLD_SIZE": "5"}, {"LOCAL_RANK": "8"}, {"LOCAL_RANK": "-1"},
                                 {"RANK": "-1", "LOCAL_RANK": "-1"}, {"WORLD_SIZE": "0"}, {"LOCAL_SIZE": "1"},
                                 {"LOCAL_SIZE": "9"}])
def test_a_rank_that_does_not_fit_its_size_is_refused(invalid: dict[str, str]) -> None:
    error = mistake(TORCH | invalid)
    assert error.problem == "rank and size do not fit together"
    assert "its own RANK below WORLD_SIZE" in error.remedy


@pytest.mark.parametrize(("environ", "named"), [
    (SRUN | TORCH | {"RANK": "4"}, {"RANK", "SLURM_PROCID"}), (SRUN | OPENMPI | {"OMPI_COMM_WORLD_SIZE": "4"},
                                                              {"OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}),
    (MPICH | OPENMPI | {"PMI_RANK": "0"}, {"OMPI_COMM_WORLD_RANK", "PMI_RANK"}),
    (PALS | {"PALS_RANKID": "4"}, {"PALS_RANKID", "PMI_RANK"}),
    (SRUN | {"WORLD_SIZE": "16"}, {"WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}),
    (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,3"}, {"SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
                                                   "SLURM_STEP_NUM_TASKS"}),
])
def test_the_variables_of_launchers_that_disagree_are_named(environ: dict[str, str], named: set[str]) -> None:
    assert set(mistake(environ).value) == named


@pytest.mark.parametrize("node", ["x", "-1", "99", "²"])
def test_a_slurm_node_that_is_not_in_the_step_is_refused(node: str) -> None:
    assert mistake(SRUN | {"SLURM_NODEID": node}).problem == "these variables disagree"


@pytest.mark.parametrize("port", ["0", "70000", "http", "²", "-1", ""])
def test_an_invalid_port_is_refused(port: str) -> None:
    assert mistake(SRUN | {"MASTER_PORT": port}).problem == "is not a valid port"


@given(st.lists(st.integers(1, 8), min_size=1, max_size=20), st.data())
def test_every_task_of_an_uneven_slurm_step_gets_its_local_size(tasks: list[int], data: st.DataObject) -> None:
    node = data.draw(st.integers(0, len(tasks) - 1))
    local = data.draw(st.integers(0, tasks[node] - 1))
    rank = sum(tasks[:node]) + local
    environ = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node),
               "SLURM_STEP_NUM_TASKS": str(sum(tasks)), "SLURM_STEP_NODELIST": f"n[1-{len(tasks)}]",
               "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks))}
    assert ranks_from_environment(environ).local_size == tasks[node]
    exported: dict[str, str] = {}
    ranks_from_environment(environ).export(exported)
    again = ranks_from_environment(exported)
    assert (again.rank, again.local_rank, again.world_size) == (rank, local, sum(tasks))


SHOW = """
import os, sys
from prelora_ds.hosts.mpi import discover_ranks, with_master_addr
ranks = with_master_addr(discover_ranks(os.environ), None)
line = f"{ranks.rank} {ranks.local_rank} {ranks.world_size} {ranks.local_size} {ranks.master_addr} {ranks.source}\\n"
os.write(1, line.encode())
"""


@pytest.mark.parametrize("strip", [False, True])
def test_ranks_under_the_real_mpirun_from_its_variables_and_without_them_from_mpi4py(strip: bool) -> None:
    script = "import os\nfor k in [k for k in os.environ if k.startswith('OMPI_COMM')]: del os.environ[k]\n" * strip
    done = subprocess.run(
        [str(Path(sys.executable).parent / "mpirun"), "-n", "3", "--oversubscribe", sys.executable, "-c",
         script + SHOW], text=True, capture_output=True, timeout=60,
        env=os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    assert done.returncode == 0, done.stderr
    source = "mpi4py" if strip else "openmpi"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert sorted(line[0] for line in lines) == sorted(line[1] for line in lines) == ["0", "1", "2"]
    assert {tuple(line[2:]) for line in lines} == {("3", "3", "127.0.0.1", source)}


def test_without_an_mpi_library_a_rank_that_only_mpi_knows_is_told_what_to_set() -> None:
    """The wheel of mpi4py is installed, but the library that it opens is missing."""
    environ = {key: value for key, value in os.environ.items() if key != "MASTER_ADDR"}
    done = subprocess.run(
        [sys.executable, "-c", "import os\nos.environ |= {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}\n"
         "from prelora_ds.errors import ConfigError\nfrom prelora_ds.hosts.discovery import Ranks\n"
         "from prelora_ds.hosts.mpi import with_master_addr\n"
         "try:\n    with_master_addr(Ranks(0, 0, 2), None)\nexcept ConfigError as error:\n    print(error)"],
        text=True, capture_output=True, timeout=60, env=environ | {"MPI4PY_LIBMPI": "/nonexistent"}, check=False)
    assert "mpi4py finds no MPI library: cannot load MPI library" in done.stdout, done.stderr
    assert "remedy: set it to the host of rank 0" in done.stdout
