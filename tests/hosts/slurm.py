"""Slurm from Debian on a test cluster: munged and slurmd on every host, slurmctld on the first."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from hosts.cluster import Cluster

TOOLS = ("slurmctld", "slurmd", "munged", "srun", "sbatch")


def why_not() -> str | None:
    """Return why Slurm cannot run here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)" if missing \
        else None


class Slurm:
    """Slurm on the hosts of a cluster. Its daemons are processes of the hosts and die with them.

    ``environ`` is the environment of srun and sbatch. apart: slurmctld runs on the last host, which gets no jobs;
    otherwise on the first one, which gets jobs too.
    """

    def __init__(self, cluster: Cluster, apart: bool = False) -> None:
        self.cluster, self.folder = cluster, cluster.state / "slurm"
        self.controller = cluster.names[-1 if apart else 0]
        self.nodes = cluster.names[:-1] if apart else cluster.names
        self.environ = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> Slurm:
        self.folder.mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={self.controller}
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%h
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
NodeName={",".join(self.nodes)} CPUs=4 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
""")
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[1-4]\n")
        (self.folder / "state").mkdir()
        for name in self.cluster.names:
            (self.folder / "spool" / name).mkdir(parents=True)
            self._run(name, f"mkdir -m 755 -p /run/munge && munged --force --key-file={key} --log-file=/run/munge/log "
                      "--pid-file=/run/munge/pid --seed-file=/run/munge/seed --socket=/run/munge/munge.socket.2")
        self._run(self.controller, f"slurmctld -L {self.folder}/ctld.log")
        for name in self.nodes:
            self._run(name, f"slurmd -N {name} -L {self.folder}/{name}.log")
        deadline = time.monotonic() + 30
        while self.run("sinfo -h -o %T").split() != ["idle"]:
            if time.monotonic() > deadline:
                raise TimeoutError(self.run("sinfo") + Path(self.folder / "ctld.log").read_text()[-2000:])
            time.sleep(0.3)
        return self

    def run(self, command: str) -> str:
        """Return the output of a command on the host of slurmctld."""
        return self._run(self.controller, command)

    def _run(self, name: str, command: str) -> str:
        # Daemons keep inherited files open. With a pipe the end of the command would not be visible.
        path = self.folder / f".{name}.out"
        process = self.cluster.start(name, ["bash", "-c", command], self.environ, log=path)
        process.wait(60)
        text = path.read_text()
        path.unlink()
        return text
