"""Scenarios on a test cluster: launches and faults, with their expected results. Each returns a row for hosts.json.

The tests run a few of them on 2 hosts; `make test-hosts` runs all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts.cluster import Cluster
from hosts.slurm import Slurm

from prelora_ds.hosts.diagnosis import is_echo
from prelora_ds.hosts.hostfile import Host, format_mpi_hosts, write_ds_env
from prelora_ds.run.log import read_lines

RECIPE = "launch/recipes/vit_tiny_debug.yaml"
PHASES = ["full", "warmup", "lora"]
PRETRAIN = "launch/pretrain.py"
FAULTY = "tests/hosts/faulty.py"
UNBOUND = ("--bind-to", "none")  # otherwise the first rank of every host would be bound to the machine's first core
PATIENCE_S, GRACE_S, HANG_S = 8, 4, 20
# Seconds from a fault to the exit of the last affected rank: the limit of a hang, or two probes of a silent host.
LIMIT_S = 60.0


@dataclass(frozen=True)
class Site:
    """A cluster, its shards, and its Slurm."""

    cluster: Cluster
    shards: Path
    slurm: Slurm | None = None

    def new(self, name: str) -> Path:
        """Return an empty folder that all hosts see."""
        folder = self.cluster.state / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def arguments(self, out: Path, *more: str) -> list[str]:
        return ["--recipe", RECIPE, "--deepspeed_config", "ds_configs/zero2.json", f"run.output_dir={out}",
                f"data.train={self.shards / 'train'}", f"data.val={self.shards / 'val'}", *more]


def losses(out: Path) -> list[float]:
    return [row["train/loss"] for row in read_lines(out / "metrics.jsonl")]


def local(site: Site, ranks: int, *more: str) -> list[float]:
    """Return the losses of the same number of ranks on one host, which a cluster must reproduce."""
    out = site.new(f"local-{ranks}-{len(more)}") / "out"
    done = site.cluster.run("host1", ["deepspeed", "--num_accelerators", ranks, PRETRAIN,
                                      *site.arguments(out, *more)], timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return losses(out)


def command_of(launcher: str, site: Site, hosts: Sequence[str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts launch/pretrain.py with one rank per host, and its environment."""
    hostfile = site.cluster.hostfile(folder / "hosts", names=hosts)
    environ = site.cluster.environ()
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")
    write_ds_env(folder / "ds_env", {name: environ[name] for name in (*names, "FAULTS")})
    at = format_mpi_hosts([Host(name, 1) for name in hosts])
    exports = [word for name in (*names, "PYTHONPATH", "PYTHONUNBUFFERED") for word in ("-x", name)]
    commands = {
        "pdsh": ["deepspeed", "--hostfile", str(hostfile), "--master_addr", hosts[0]],
        "openmpi": ["deepspeed", "--hostfile", str(hostfile), "--launcher", "openmpi",
                    "--launcher_args=--mca btl_tcp_if_include eth0 " + " ".join(UNBOUND)],
        "mpirun": ["mpirun", "--host", at, "-n", str(len(hosts)), *UNBOUND, *exports, "python"],
        "mpich": ["/usr/bin/mpiexec.hydra", "-hosts", ",".join(hosts), "-n", str(len(hosts)), "-ppn", "1", "-genv",
                  "MASTER_ADDR", hosts[0], "python"],
        "srun": ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1",
                 "--kill-on-bad-exit=1", "--wait=30", "python"],
        # One torchrun per host, which starts the ranks of the host.
        "torchrun": ["srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1",
                     "--kill-on-bad-exit=1", "bash", "-c",
                     f'exec torchrun --nnodes={len(hosts)} --nproc-per-node=1 --master-addr={hosts[0]} '
                     '--node-rank="$SLURM_PROCID" "$@"', "torchrun"]}
    return commands[launcher], {"DS_ENV_FILE": str(folder / "ds_env"), **(site.slurm.environ if site.slurm else {})}


def launch(site: Site, launcher: str, expected: Sequence[float], size: int = 2, *more: str,
           timeout: float = 200) -> dict[str, Any]:
    """Train through all three phases; the losses must be bitwise ``expected`` (those of local ranks)."""
    folder, hosts = site.new(f"{launcher}-{size}"), site.cluster.names[:size]
    command, environ = command_of(launcher, site, hosts, folder)
    begun, out = time.monotonic(), folder / "out"
    process = site.cluster.start("host1", [*command, PRETRAIN, *site.arguments(
        out, "launch.interface=eth0", *more)], environ, log=folder / "log")
    started = _until(lambda: process.poll() is not None or _steps(out) > 0, timeout)
    process.wait(timeout)
    total = time.monotonic() - begun
    said = (folder / "log").read_text(errors="replace")
    assert process.returncode == 0, said[-3000:]
    assert (out / "model").is_dir(), said[-3000:]
    rows = read_lines(out / "metrics.jsonl")
    assert list(dict.fromkeys(row["phase"] for row in rows)) == PHASES
    if expected:
        assert [row["train/loss"] for row in rows] == list(expected)
    left = [pid for name in site.cluster.names for pid in site.cluster.pids(name, "pretrain.py")]
    assert not left, f"ranks are left: {left}"
    return {"what": f"{launcher}, {size} hosts", "hosts": size, "start_s": round(started, 1),
            "total_s": round(total, 1), "exit_code": 0,
            "result": f"{len(rows)} steps, 3 phases" + (", losses those of local ranks, bitwise" if expected else "")}


@dataclass(frozen=True)
class Fault:
    """A fault of ``host2``, one of two hosts, during a run.

    strike: causes the fault. undo: undoes it, after the ranks have ended. named: how the supervisor names the failure.
    early: the fault occurs before the run starts.
    """

    name: str
    strike: Callable[[Site], None]
    undo: Callable[[Site], None] = lambda site: None
    named: str = "host2"
    early: bool = False


def rank_pids(site: Site, name: str, script: str = FAULTY) -> list[int]:
    """Return the ranks of a host: Python with the script. Launchers have the script later in their command lines."""
    return [pid for pid in site.cluster.pids(name, script)
            if script in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:3]]


def _signal_rank(number: int) -> Callable[[Site], None]:
    return lambda site: [os.kill(pid, number) for pid in rank_pids(site, "host2")] and None


FAULTS = [
    Fault("a rank raises", lambda site: (site.cluster.state / "faults" / "host2").touch()),
    Fault("a rank never comes", lambda site: (site.cluster.state / "faults" / "host2.late").touch(),
          named="host2 (exit code 75): rank 0: ranks 1 of 2 did not check in", early=True),
    Fault("a rank is killed", _signal_rank(signal.SIGKILL)),
    Fault("a rank is frozen", _signal_rank(signal.SIGSTOP)),
    Fault("sshd is gone", lambda site: [os.kill(pid, signal.SIGKILL) for pid in site.cluster.pids("host2", "sshd")]
          and None),
    Fault("the link is cut, and mended later", lambda site: site.cluster.link("host2", up=False),
          undo=lambda site: site.cluster.link("host2", up=True)),
    Fault("the host is frozen", lambda site: site.cluster.freeze("host2"),
          undo=lambda site: site.cluster.freeze("host2", signal.SIGCONT)),
    Fault("the host is killed", lambda site: site.cluster.kill("host2")),
    Fault("the host is powered off", lambda site: site.cluster.power_off("host2")),
]
SWEEP = "a sweep in a Slurm job array"
NO_SPARE = Fault("no spare: fewer hosts", FAULTS[-1].strike)
STEPS = ["train.duration=20 steps", "train.eval_every=20 steps", "checkpoint.every=5 steps"]


def supervise(site: Site, folder: Path, nodes: int = 2, *more: str,
              length: Sequence[str] = STEPS) -> subprocess.Popen[str]:
    """Start `prelora supervise` on host1, with all hosts of the cluster."""
    hostfile = site.cluster.hostfile(folder / "hosts")
    return site.cluster.start("host1", [
        "prelora", "supervise", "--hostfile", hostfile, "--nodes", nodes, "--patience", PATIENCE_S, "--grace", GRACE_S,
        "--probe-every", 3, *more, "--", "mpirun", "--host", "{hosts}", "-n", "{ranks}",
        *UNBOUND,
        *(word for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", "FAULTS",
                            "PYTHONUNBUFFERED", "MASTER_ADDR", "MASTER_PORT") for word in ("-x", name)),
        "--mca", "prte_keep_fqdn_hostnames", "1", "python", FAULTY, *site.arguments(
            folder / "out", *length, f"guard.hang_limit={HANG_S} s", "launch.timeout_s=20", "launch.interface=eth0")],
        log=folder / "log")


def strike(site: Site, fault: Fault, expected: Sequence[float], nodes: int = 2, *more: str) -> dict[str, Any]:
    """Cause ``fault`` in a supervised run: it is named, and the run finishes on other hosts as ``expected``."""
    folder = site.new(fault.name.replace(" ", "-"))
    out, begun = folder / "out", time.monotonic()
    if fault.early:
        fault.strike(site)
    process = supervise(site, folder, nodes, *more)
    if not fault.early:
        _until(lambda: (out / "checkpoints" / "latest").exists(), 120)
        fault.strike(site)
    struck = time.monotonic()
    failure = folder / "out.supervise" / "attempt-1" / "failure.json"
    _until(lambda: failure.exists() or process.poll() is not None, 120)
    bounded = time.monotonic() - struck
    process.wait(240)
    said = (folder / "log").read_text(errors="replace")
    fault.undo(site)
    assert failure.exists(), said[-3000:]
    assert bounded < LIMIT_S, f"{bounded:.0f} s"
    named = next(line for line in said.splitlines() if "attempt 1 failed" in line)
    assert f"failed on {fault.named}" in named, named
    assert "(exit code 0)" not in named
    assert process.returncode == 0, said[-3000:]
    got = losses(out)
    assert len(got) == len(expected), f"{len(got)} steps"
    bitwise = got == list(expected)
    close = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    # Without a spare the run continues with fewer ranks, and BF16 rounding differs.
    apart = [(row["step"], row["phase"]) for row, loss in zip(read_lines(out / "metrics.jsonl"), expected, strict=True)
             if abs(row["train/loss"] - loss) > 5e-3]
    assert bitwise if nodes < len(site.cluster.names) else not apart, (close, apart[:3])
    _until(lambda: not any(rank_pids(site, name) for name in site.cluster.names if site.cluster.alive(name)), 30)
    return {"what": fault.name, "hosts": nodes, "total_s": round(time.monotonic() - begun, 1),
            "ended_s": round(bounded, 1), "named": "host2" in named, "says": named.partition("supervise: ")[2][:160],
            "result": "resumed, bitwise" if bitwise else f"resumed on fewer hosts, losses within {close:.1e}"}


def supervisor_killed(site: Site) -> dict[str, Any]:
    """Ranks without a supervisor stop with a checkpoint."""
    folder = site.new("supervisor-killed")
    process = supervise(site, folder, length=_length(400))  # longer than the patience of the ranks
    _until(lambda: (folder / "out" / "checkpoints" / "latest").exists(), 120)
    for pid in site.cluster.pids("host1", "prelora supervise"):
        os.kill(pid, signal.SIGKILL)
    struck = time.monotonic()
    _until(lambda: not any(rank_pids(site, name) for name in ("host1", "host2")), LIMIT_S)
    records = [path.read_text() for path in (folder / "out.supervise" / "attempt-1").glob("exit-*.json")]
    # A rank may notice that another one has ended before it checks the heartbeat itself.
    ends = [json.loads(text) for text in records]
    assert any(end["code"] == 87 for end in ends) and all(is_echo(end) for end in ends), records
    assert (folder / "out.supervise" / "attempt-1" / "STOPPED").exists(), records
    process.wait(30)
    assert process.returncode != 0
    return {"what": "the supervisor is killed", "hosts": 2, "ended_s": round(time.monotonic() - struck, 1),
            "named": all('"host": "host' in text for text in records),
            "says": next(text for text in records if '"code": 87' in text)[:160],
            "result": "ranks stop with a checkpoint"}


def refused(site: Site, name: str, command: Sequence[str | Path], words: Sequence[str], environ: dict[str, str],
            limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Run a launch that must fail: in bounded time, not with exit code 0, and with ``words`` in its output."""
    begun = time.monotonic()
    done = site.cluster.run("host1", command, environ, timeout=limit_s + 30)
    took = time.monotonic() - begun
    assert done.returncode != 0, done.stdout[-2000:]
    assert took < limit_s, f"{took:.0f} s"
    for word in words:
        assert word in done.stdout, done.stdout[-3000:]
    line = next((line for line in done.stdout.splitlines() if words[0] in line), "")
    return {"what": name, "hosts": 2, "ended_s": round(took, 1), "exit_code": done.returncode, "named": True,
            "says": line[:160], "result": "refused"}


def slow_host(site: Site) -> dict[str, Any]:
    """A slow host is reported during the run: each rank has half a core, then one rank has a tenth."""
    folder, hosts = site.new("slow"), site.cluster.names
    command, environ = command_of("mpirun", site, hosts, folder)
    process = site.cluster.start("host1", [*command, PRETRAIN, *site.arguments(
        folder / "out", "launch.interface=eth0", "train.global_batch_size=48", "train.duration=240 steps",
        "train.eval_every=240 steps", "convergence=null")], environ, log=folder / "log")
    events = folder / "out" / "events.jsonl"

    def named() -> list[dict[str, Any]]:
        return [row for row in read_lines(events) if row["event"] == "straggler" and row["change"] != "ended"]

    def steps_of(count: int) -> int:
        last = _steps(folder / "out") + count
        _until(lambda: _steps(folder / "out") >= last or process.poll() is not None, 120)
        return last

    steps_of(1)
    # There are more ranks than cores: without equal shares one rank is always slow.
    with contextlib.ExitStack() as shares:
        for host in hosts:
            shares.enter_context(site.cluster.slow_processes(rank_pids(site, host, PRETRAIN), share=0.5))
        equal = steps_of(20)
        steps_of(40)
        before, begun = [row for row in named() if row["step"] > equal], time.monotonic()
        with site.cluster.slow_processes(rank_pids(site, "host2", PRETRAIN), share=0.1):
            took = _until(lambda: process.poll() is not None or any(
                row["host"] == "host2" for row in named() if row["step"] > equal), 120)
    process.wait(200)
    said = (folder / "log").read_text(errors="replace")
    assert process.returncode == 0 and not before, (before, said[-3000:])
    line = next(line for line in said.splitlines() if "warning: host host2" in line)
    return {"what": "a host is slow", "hosts": len(hosts), "total_s": round(time.monotonic() - begun, 1),
            "ended_s": round(took, 1), "named": True, "says": line[line.index("warning"):][:160],
            "result": f"named after step {named()[-1]['step']}, and the run goes on"}


def full_while_training(site: Site) -> dict[str, Any]:
    """A host's own disk for copies of shards is full: the host reports it, and the run continues without copies."""
    folder, full, port = site.new("full"), site.cluster.scratch / "full", 8123
    command, environ = command_of("pdsh", site, site.cluster.names[:2], folder)
    server = site.cluster.start("host1", ["python", "tests/support/web.py", site.shards, port], log=folder / "server")
    with (folder / "ds_env").open("a") as file:
        file.write(f"XDG_CACHE_HOME={folder}/home\n")  # copies of manifests
    site.cluster.run("host2", ["dd", "if=/dev/zero", f"of={full}", "bs=1M"])
    begun = time.monotonic()
    try:
        done = site.cluster.run("host1", [*command, PRETRAIN, *site.arguments(
            folder / "out", "launch.interface=eth0", f"data.train=http://host1:{port}/train",
            f"data.val=http://host1:{port}/val", f"data.cache_dir={site.cluster.scratch}/cache")], environ)
    finally:
        site.cluster.run("host2", ["rm", full])
        for pid in site.cluster.pids("host1", "support/web.py"):
            os.kill(pid, signal.SIGKILL)
        server.wait()
    assert done.returncode == 0, done.stdout[-3000:]
    assert losses(folder / "out") == local(site, 2)
    line = next(line for line in done.stdout.splitlines() if " is full (" in line)
    assert "scratch/cache on host host2 is full" in line, line
    return {"what": "the disk of one host is full, while training", "hosts": 2, "named": True,
            "total_s": round(time.monotonic() - begun, 1), "says": line[line.index("warning"):][:240],
            "result": "goes on, losses those of local ranks, bitwise"}


OTHER_FAULTS = {"the supervisor is killed": supervisor_killed, "a host is slow": slow_host,
                "the disk of one host is full, while training": full_while_training}


def preflight(site: Site) -> dict[str, Any]:
    """All hosts pass all checks, in less than a minute."""
    folder = site.new("preflight")
    begun = time.monotonic()
    done = site.cluster.run("host1", [
        "prelora", "preflight", "--hostfile", site.cluster.hostfile(folder / "hosts"), "--recipe", RECIPE,
        f"run.output_dir={folder}/out", f"data.train={site.shards}/train", f"data.val={site.shards}/val"], timeout=200)
    assert done.returncode == 0, done.stdout
    return {"what": f"preflight, {len(site.cluster.names)} hosts", "hosts": len(site.cluster.names),
            "total_s": round(time.monotonic() - begun, 1), "exit_code": 0, "result": "all fit"}


def slurm_chain(site: Site) -> dict[str, Any]:
    """Run the script of `prelora job` in a real Slurm with a limit of 3 minutes.

    Slurm sends its signal before the limit; the run exits with a checkpoint and 99, is requeued, and resumes to its
    end. Slurm may send the signal up to a minute early, so 60 to 120 s after the start; the run has steps for 150 s.
    """
    folder, begun = site.new("chain"), time.monotonic()
    steps = _steps_for(site, 150)
    job = _submit(site, folder, "3m", *_length(steps))
    requeued = _until(lambda: "Restarts=1" in _about(site, job), 240)
    log = next(folder.glob("*.log"))
    _until(lambda: "the run exited with 0" in log.read_text(), 600)
    rows = read_lines(folder / "out" / "events.jsonl")
    resumed = [row["step"] for row in rows if row["event"] == "resume"]
    done_steps = [row["step"] for row in read_lines(folder / "out" / "metrics.jsonl")]
    assert resumed and done_steps == list(range(1, steps + 1)), (resumed, len(done_steps))
    assert "the run exited with 99" in log.read_text()
    return {"what": "a Slurm chain: signal, checkpoint, 99, requeue, resumed to the end", "hosts": 3,
            "total_s": round(time.monotonic() - begun, 1),
            "result": f"requeued {requeued:.0f} s after it was submitted, resumed after steps {resumed} of {steps}"}


def slurm_node_dies(site: Site) -> dict[str, Any]:
    """A node of a Slurm job goes down: the job survives, and the run resumes bitwise on its spare."""
    assert site.slurm is not None
    folder = site.new("node-dies")
    length = _length(_steps_for(site, 40))
    expected, begun = local(site, 2, *length), time.monotonic()
    job = _submit(site, folder, "10m", *length)
    _until(lambda: (folder / "out" / "checkpoints" / "latest").exists(), 120)
    struck = time.monotonic()
    site.cluster.kill("host2")
    site.slurm.run("scontrol update nodename=host2 state=down reason=dead")
    log = next(folder.glob("*.log"))
    _until(lambda: "attempt 1 failed" in log.read_text(), 120)
    bounded = time.monotonic() - struck
    assert {"JobState=RUNNING", "Restarts=0"} <= _about(site, job)
    _until(lambda: "the run exited with" in log.read_text(), 300)
    said = log.read_text()
    named = next(line for line in said.splitlines() if "attempt 1 failed" in line)
    assert "failed on host2" in named, said
    assert "the run exited with 0" in said and "attempt 2: 2 hosts: host1, host3" in said, said
    assert losses(folder / "out") == expected
    return {"what": "a node of a Slurm job goes down", "hosts": 3, "total_s": round(time.monotonic() - begun, 1),
            "ended_s": round(bounded, 1), "named": True, "says": named.partition("supervise: ")[2][:160],
            "result": "the job lives on, resumed on its spare, bitwise"}


def slurm_first_node_dies(site: Site) -> dict[str, Any]:
    """The node with the script and the supervisor goes down, which --no-kill tolerates.

    The last node requeues the job, and the run resumes bitwise on other nodes.
    """
    assert site.slurm is not None
    folder = site.new("first-node-dies")
    length = _length(_steps_for(site, 30))
    expected, begun = local(site, 2, *length), time.monotonic()
    job = _submit(site, folder, "10m", *length)
    _until(lambda: (folder / "out" / "checkpoints" / "latest").exists(), 120)
    struck = time.monotonic()
    site.cluster.kill("host1")
    site.slurm.run("scontrol update nodename=host1 state=down reason=dead")
    assert {"JobState=RUNNING", "Restarts=0"} <= _about(site, job)
    _until(lambda: "Restarts=1" in _about(site, job), 200)
    bounded = time.monotonic() - struck
    log = next(folder.glob("*.log"))
    _until(lambda: "the run exited with 0" in log.read_text(), 400)
    resumed = [row["step"] for row in read_lines(folder / "out" / "events.jsonl") if row["event"] == "resume"]
    assert resumed and losses(folder / "out") == expected
    return {"what": "the first node of a Slurm job goes down", "hosts": 3, "named": True,
            "total_s": round(time.monotonic() - begun, 1), "ended_s": round(bounded, 1),
            "says": next(line for line in log.read_text().splitlines() if "hosts: host2, host3" in line),
            "result": f"requeued, resumed after steps {resumed}, bitwise"}


def slurm_sweep(site: Site) -> dict[str, Any]:
    """A job array of a real Slurm trains two forks of one checkpoint, each with another learning rate, on its own node.

    Both forks come from the same weights, so their first losses are the same bits, and the later ones are not.
    """
    assert site.slurm is not None
    source = site.cluster.state / f"runs/local-2-{len(STEPS)}/out"
    if not source.exists():
        local(site, 2, *STEPS)
    checkpoint = source / "checkpoints" / "step-00000015"
    folder, begun = site.new("sweep"), time.monotonic()
    rates = ("0.001", "0.002")
    job = _submit(site, folder, "10m", *STEPS, nodes=1, spares=0, options=[
        "--sweep", f"optimizer.lr={','.join(rates)}", "--resume", checkpoint])
    logs = [folder / f"vit_tiny_debug-{job}_{task}.log" for task in range(len(rates))]
    _until(lambda: all(log.exists() and "the run exited with" in log.read_text() for log in logs), 200)
    said = [log.read_text() for log in logs]
    assert all("the run exited with 0" in text for text in said), said[0][-2000:] + said[1][-2000:]

    outs = [folder / f"out-lr-{rate}" for rate in rates]
    rows = [read_lines(out / "metrics.jsonl") for out in outs]
    assert [[row["step"] for row in run] for run in rows] == [[16, 17, 18, 19, 20]] * 2
    assert all((out / "model").is_dir() for out in outs)
    assert all([event["step"] for event in read_lines(out / "events.jsonl") if event["event"] == "fork"] == [15]
               for out in outs)
    assert all(twice["lr"] == 2 * once["lr"] for once, twice in zip(*rows, strict=True))
    first, second = ([row["train/loss"] for row in run] for run in rows)
    assert first[0] == second[0] and all(a != b for a, b in zip(first[1:], second[1:], strict=True))
    hosts = {event["hosts"][0] for out in outs for event in read_lines(out / "events.jsonl") if event["event"] == "job"}
    return {"what": SWEEP, "hosts": len(hosts), "total_s": round(time.monotonic() - begun, 1),
            "result": "both finished in their own folders, from one checkpoint"}


def _steps_for(site: Site, seconds: float) -> int:
    """Return the number of steps that two ranks make in this time on this machine."""
    local(site, 2, *STEPS)
    pace = read_lines(site.cluster.state / f"runs/local-2-{len(STEPS)}/out/metrics.jsonl")[10:]
    return 20 * max(1, round(seconds / 20 / statistics.median(row["step_s"] + row["data_s"] for row in pace)))


def _length(steps: int) -> list[str]:
    return [f"train.duration={steps} steps", f"train.eval_every={steps} steps", "checkpoint.every=20 steps"]


def _submit(site: Site, folder: Path, walltime: str, *more: str, nodes: int = 2, spares: int = 1,
            options: Sequence[str | Path] = ()) -> str:
    """Submit the script that `prelora job` writes, with one rank per node; return the job id."""
    assert site.slurm is not None
    profile = Path("prelora_ds/hosts/profiles/slurm.yaml").read_text()
    (folder / "mine.yaml").write_text(profile.replace("ranks_per_node: 4", "ranks_per_node: 1").replace(
        "--ntasks-per-node=4", "--ntasks-per-node=1"))
    arguments, script = site.arguments(folder / "out", "launch.interface=eth0", *more), folder / "job.sh"
    done = site.cluster.run("host1", ["prelora", "job", *arguments[1:2], "--profile", folder / "mine.yaml",
                                      "--deepspeed-config", arguments[3], "--nodes", nodes, "--spares", spares,
                                      "--walltime", walltime, "--warn", "60", "--out", script, *options,
                                      *arguments[4:]])
    assert done.returncode == 0, done.stdout
    script.write_text(script.read_text().replace("#!/bin/bash -l", "#!/bin/bash").replace("sleep 300", "sleep 20"))
    return site.slurm.run(f"sbatch --parsable --chdir={folder} {script}").strip()


def _about(site: Site, job: str) -> set[str]:
    assert site.slurm is not None
    return set(site.slurm.run(f"scontrol show job {job}").split())


def _steps(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _until(condition: Callable[[], bool], timeout_s: float) -> float:
    """Wait until ``condition`` holds; return the seconds waited. Raises TimeoutError."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > timeout_s:
            raise TimeoutError(f"nothing in {timeout_s:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - begun

