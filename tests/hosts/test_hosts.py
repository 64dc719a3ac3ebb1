"""Every launcher on two hosts gives the losses of two local ranks, and a host whose rank dies is replaced.

`make test-hosts` tests 4 and 16 hosts, and every fault.
"""

from __future__ import annotations

import json

import pytest
from hosts import scenarios
from hosts.scenarios import Site


@pytest.mark.parametrize("launcher", ["pdsh", "mpirun", "srun"])
def test_two_hosts_train_as_two_local_ranks(site: Site, expected: list[float], launcher: str) -> None:
    assert len(expected) == 20
    scenarios.launch(site, launcher, expected, 2, *scenarios.STEPS)


def test_preflight_reports_the_problems_of_each_host(site: Site) -> None:
    folder = site.new("preflight")
    (site.cluster.state / "host2" / "site" / "peft-9.9.9.dist-info").mkdir()
    metadata = site.cluster.state / "host2" / "site" / "peft-9.9.9.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n")
    clock = site.cluster.state / "host2" / "site" / "sitecustomize.py"  # namespaces share the wall clock
    clock.write_text("import time\nthe_time = time.time\ntime.time = lambda: the_time() + 90\n")
    full = site.cluster.scratch / "full"
    hosts = site.cluster.state / "host3" / "hosts"
    before = hosts.read_text()
    try:
        hosts.write_text(before.replace(site.cluster.address("host3"), "127.0.1.1"))
        site.cluster.run("host3", ["dd", "if=/dev/zero", f"of={full}", "bs=1M"])
        site.cluster.slow_link("host3", 200)
        hostfile = folder / "hosts"
        hostfile.write_text("host1 slots=1\nhost2 slots=1\nhost3 slots=1\nhost9 slots=1\n")
        done = site.cluster.run("host1", [
            "prelora", "preflight", "--hostfile", hostfile, "--recipe", scenarios.RECIPE, "--scratch",
            site.cluster.scratch, "--json", f"run.output_dir={folder}/out",
            f"data.train={site.shards}/train", f"data.val={site.shards}/none", "--interface", "eth0"])
    finally:
        site.cluster.slow_link("host3", None)
        site.cluster.run("host3", ["rm", "-f", full])
        hosts.write_text(before)
        clock.unlink()
        metadata.unlink()
        metadata.parent.rmdir()
    report = json.loads(done.stdout)
    assert done.returncode == 75 and not report["fit"], done.stdout
    problems = {host: " ".join(answer["problems"]) for host, answer in report["hosts"].items()}
    assert "there is no manifest" in problems["host1"] or "none" in problems["host1"]
    assert "peft: 9.9.9 (other hosts: " in problems["host2"] and "its clock is +90.0 s off" in problems["host2"]
    assert "resolves to 127.0.1.1" in problems["host3"] and "No space left" in problems["host3"]
    assert "unreachable" in problems["host9"]
    assert [host for host, said in problems.items() if "slow: " in said] == ["host3"]
    for host in ("host1", "host2", "host3"):
        assert report["hosts"][host]["all_reduce"]["correct"]
    assert report["seconds"] < 60


def test_the_host_of_a_killed_rank_is_named_and_the_run_resumes_bitwise_on_a_spare(
        site: Site, expected: list[float]) -> None:
    killed = next(fault for fault in scenarios.FAULTS if fault.name == "a rank is killed")
    row = scenarios.strike(site, killed, expected)
    assert row["named"] and row["result"] == "resumed, bitwise"


def test_a_sweep_in_slurm_trains_each_value_in_its_own_folder_from_one_checkpoint(
        site: Site, expected: list[float]) -> None:
    assert len(expected) == 20  # of the run whose checkpoint is taken
    assert scenarios.slurm_sweep(site)["hosts"] == 2
