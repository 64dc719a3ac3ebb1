"""Launches that must fail, and their messages."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from hosts.scenarios import PRETRAIN, Site, command_of, losses, refused


def _pretrain(site: Site, folder: Path, *more: str) -> list[str]:
    return [PRETRAIN, *site.arguments(folder / "out", "launch.timeout_s=25", *more)]


def port_in_use(site: Site) -> dict[str, Any]:
    folder = site.new("port")
    command, environ = command_of("pdsh", site, ["host1", "host2"], folder)
    holder = site.cluster.start("host1", ["python", "-c", "import socket, time; s = socket.create_server(('', 29777)); "
                                          "print('held', flush=True); time.sleep(600)"])
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        return refused(site, "the port is in use", [*command, "--master_port", "29777", *_pretrain(site, folder)],
                       ["MASTER_PORT = 29777: is in use on host host1"], environ, 90)
    finally:
        for pid in site.cluster.pids("host1", "29777"):
            os.kill(pid, signal.SIGKILL)
        holder.wait()


def unreachable_master(site: Site) -> dict[str, Any]:
    """Without --master_addr DeepSpeed uses the first address of `hostname -I`; here it is unreachable."""
    folder = site.new("decoy")
    command, environ = command_of("pdsh", site, ["host1", "host2"], folder)
    site.cluster.add_decoy("host1", "10.99.0.1")
    command = [word for i, word in enumerate(command) if "--master_addr" not in (word, command[i - 1])]
    return refused(site, "a decoy is the first address", [*command, *_pretrain(site, folder)],
                   ["ranks 1 of 2 did not check in within 25 s", "host1"], environ, 120)


def name_on_loopback(site: Site) -> dict[str, Any]:
    """The run succeeds, because gloo gets the interface that leads to the master; preflight reports the host."""
    hosts = site.cluster.state / "host2" / "hosts"
    before = hosts.read_text()
    hosts.write_text(before.replace("10.77.0.2 host2", "127.0.1.1 host2"))
    try:
        folder = site.new("loopback")
        command, environ = command_of("pdsh", site, ["host1", "host2"], folder)
        done = site.cluster.run("host1", [*command, *_pretrain(site, folder)], environ, timeout=120)
        assert done.returncode == 0 and len(losses(folder / "out")) == 20, done.stdout[-2000:]
        found = site.cluster.run("host1", ["prelora", "preflight", "--hostfile", folder / "hosts", "--folder", folder])
    finally:
        hosts.write_text(before)
    line = next(line for line in found.stdout.splitlines() if "127.0.1.1" in line and line.startswith("host2: "))
    assert found.returncode == 75
    return {"what": "a host's name points to loopback", "hosts": 2, "named": True, "says": line[:160],
            "result": "preflight refuses; a run copes"}


def other_version(site: Site) -> dict[str, Any]:
    folder, package = site.new("version"), site.cluster.state / "host2" / "site" / "peft-9.9.9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n")
    try:
        command, environ = command_of("pdsh", site, ["host1", "host2"], folder)
        return refused(site, "another version of a package", [*command, *_pretrain(site, folder)],
                       ["peft = '9.9.9': on host host2 (rank 1)"], environ)
    finally:
        shutil.rmtree(package)


def wrong_hostfile(site: Site) -> dict[str, Any]:
    folder = site.new("hostfile")
    (folder / "hosts").write_text("host1 slots=1\nhost2 slot=1\n")
    return refused(site, "a wrong line in the hostfile", ["prelora", "preflight", "--hostfile", folder / "hosts"],
                   [f"{folder}/hosts:2 = 'host2 slot=1'"], {})


def unreachable_host(site: Site) -> dict[str, Any]:
    folder = site.new("unreachable")
    (folder / "hosts").write_text("host1 slots=1\nhost77 slots=1\n")
    return refused(site, "an unreachable host", [
        "prelora", "supervise", "--hostfile", folder / "hosts", "--nodes", "2", "--patience", "5", "--", "python",
        *_pretrain(site, folder)], ["host host77 does not respond", "unreachable: host77"], {})


def full_disk(site: Site) -> dict[str, Any]:
    """The disk of one host is full. (The tests of checkpoints cover a full disk under the checkpoint.)"""
    folder, full = site.new("disk"), site.cluster.scratch / "full"
    site.cluster.run("host2", ["dd", "if=/dev/zero", f"of={full}", "bs=1M"])
    try:
        return refused(site, "the disk of one host is full", [
            "prelora", "preflight", "--hostfile", site.cluster.hostfile(folder / "hosts"), "--folder", folder,
            "--scratch", site.cluster.scratch], ["host2: " + str(site.cluster.scratch), "No space left"], {})
    finally:
        site.cluster.run("host2", ["rm", full])


def data_of_one_host(site: Site) -> dict[str, Any]:
    """A host does not have the shards. Its first rank finds out, and the message names the host, once."""
    folder, data = site.new("no-data"), site.cluster.scratch / "digits"
    site.cluster.run("host1", ["cp", "-r", site.shards, data])
    command, environ = command_of("pdsh", site, ["host1", "host2"], folder)
    site.cluster.hostfile(folder / "hosts", slots=2, names=["host1", "host2"])
    try:
        row = refused(site, "the data of one host is missing", [
            *command, *_pretrain(site, folder, f"data.train={data}/train", f"data.val={data}/val")],
            ["error: rank 2 on host host2 could not start: data.val"], environ)
    finally:
        site.cluster.run("host1", ["rm", "-r", data])
    return row | {"ranks": 4}


REFUSALS = {"the data of one host is missing": data_of_one_host, "the port is in use": port_in_use,
            "another version of a package": other_version,
            "a wrong line in the hostfile": wrong_hostfile, "an unreachable host": unreachable_host,
            "the disk of one host is full": full_disk, "a host's name points to loopback": name_on_loopback,
            "a decoy is the first address": unreachable_master}
