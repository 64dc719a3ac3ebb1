"""`prelora supervise`: start a run with any launcher, watch it, and restart it on healthy hosts.

It runs on the first host. A run counts as successful by what the ranks leave on disk (DONE,
STOPPED), never by the launcher's exit code, which was seen to be 0 after pdsh had been killed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from prelora_ds.errors import STOPPED_EXIT_CODE, USAGE_EXIT_CODE, ConfigError, LaunchError
from prelora_ds.hosts.diagnosis import Failure, aborted_ranks, diagnose, records_of, succeeded
from prelora_ds.hosts.heartbeat import HEARTBEAT_FILE, LOCK_FILE, attempt_of, write_json
from prelora_ds.hosts.hostfile import (
    Host,
    format_hostfile,
    format_mpi_hosts,
    is_shell_safe,
    split_command,
    substitute,
    write_ds_env,
)
from prelora_ds.hosts.lock import Lock
from prelora_ds.hosts.network import interface_environment, is_mine

TICK_S = 0.5
FENCE_S = 6.0  # the guard of a rank checks the heartbeat every 5 s
PROBE_TIMEOUT_S = 30.0  # the probes of the Slurm profiles have their own limit of 20 s
FORWARDED = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "LD_LIBRARY_PATH", "PATH",
             "PRELORA_JOB_END", "SLURM_JOB_END_TIME")
PROBE = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true"


@dataclass(frozen=True)
class Policy:
    """How many hosts a run gets, and how patient the supervisor is.

    nodes: hosts of the run; the others are spares.
    min_nodes: the smallest number of hosts to continue with, if the global batch divides evenly.
    patience_s: a rank exits after this many seconds without a heartbeat. When too few hosts
        respond, the supervisor keeps looking for hosts for the same time.
    grace_s: seconds between the first exit of a rank and SIGTERM, and between that and SIGKILL.
    probe_s: seconds between host probes during a run; two failed probes in a row end the attempt.
    """

    nodes: int
    min_nodes: int
    max_restarts: int = 3
    patience_s: float = 60.0
    grace_s: float = 15.0
    probe_s: float = 20.0
    probe: str = PROBE
    interface: str | None = None
    master_port: int = 29500


@dataclass
class Supervisor:
    """Runs ``command`` on ``hosts``, attempt by attempt.

    folder: a folder that all hosts share.
    progress: returns a value that changes with each checkpoint.
    fits: whether the run can use this number of ranks.
    say: prints a line.
    """

    command: Sequence[str]
    hosts: Sequence[Host]
    folder: Path
    policy: Policy
    progress: Callable[[], object]
    fits: Callable[[int], bool]
    say: Callable[[str], None]
    failures: Counter[str] = field(default_factory=Counter)
    stop_requested: bool = False

    def __post_init__(self) -> None:
        self._lock = Lock(self.folder / LOCK_FILE)

    def run(self) -> int:
        """Make attempts until one succeeds.

        Returns the exit code: 0, 99 (stopped with a checkpoint), or that of a failure.

        Raises LaunchError when another supervisor has the run (a newer attempt would end its
        ranks), or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            try:
                return self._attempts()
            finally:
                self._lock.release()
        except OSError as exc:
            raise LaunchError(f"{exc.filename or self.folder} cannot be written ({exc.strerror})\n"
                              "  remedy: free space, and run the same command again") from exc

    def _attempts(self) -> int:
        first = 1 + max((attempt_of(path) or 0 for path in self.folder.iterdir()), default=0)
        previous: tuple[object, object] | None = None
        for attempt in range(first, first + self.policy.max_restarts + 1):
            self._send_heartbeat(attempt)
            chosen = self._choose_hosts(attempt)
            names = ", ".join(host.name for host in chosen)
            self.say(f"attempt {attempt}: {len(chosen)} hosts: {names}")
            outcome = self._attempt(attempt, chosen)
            if isinstance(outcome, int):
                return outcome

            failure = outcome
            where = f" on {', '.join(failure.hosts)}" if failure.hosts else ""
            self.say(f"attempt {attempt} failed{where} (exit code {failure.code}): {failure.why}")
            if (lost := self._lock.check()) is not None:
                code, why = lost
                self.say(why)
                return code
            write_json(self.folder / f"attempt-{attempt}" / "failure.json", vars(failure))
            if failure.code == USAGE_EXIT_CODE or self.stop_requested:
                return failure.code
            current = ((failure.code, failure.kind), self.progress())
            if current == previous:
                self.say("giving up: the same failure twice without a new checkpoint")
                return failure.code
            previous = current
            self.failures.update(failure.hosts)
        self.say(f"giving up after {self.policy.max_restarts} restarts")
        return failure.code

    def _choose_hosts(self, attempt: int) -> list[Host]:
        """Return the first healthy hosts; hosts that failed before come last.

        Raises LaunchError if too few respond within the patience.
        """
        deadline = time.monotonic() + self.policy.patience_s
        reported = set[str]()
        while True:
            unreachable = self._unreachable(self.hosts)
            for name in unreachable:
                if name not in reported:
                    self.say(f"host {name} does not respond")
            reported.update(unreachable)
            chosen = self._choose_from(
                [host for host in self.hosts if host.name not in unreachable])
            left = deadline - time.monotonic()
            if len(chosen) == self.policy.nodes or self.stop_requested or left <= 0:
                break
            # The hosts may be healthy, and a scheduler that restarts may not answer the probes.
            self._send_heartbeats_for(min(left, self.policy.probe_s), attempt)
        if chosen:
            return chosen

        needed = f"{self.policy.nodes} needed"
        if self.policy.min_nodes < self.policy.nodes:
            needed += f" (at least {self.policy.min_nodes} if the batch divides)"
        raise LaunchError(f"only {len(self.hosts) - len(unreachable)} of {len(self.hosts)} hosts "
                          f"respond, {needed}; unreachable: {', '.join(unreachable) or 'none'}\n"
                          "  remedy: add spare hosts, or lower --min-nodes")

    def _choose_from(self, hosts: Sequence[Host]) -> list[Host]:
        healthy = sorted(hosts, key=lambda host: self.failures[host.name])
        for count in range(min(self.policy.nodes, len(healthy)), self.policy.min_nodes - 1, -1):
            chosen = healthy[:count]
            if self.fits(sum(host.slots for host in chosen)):
                return sorted(chosen, key=self.hosts.index)
        return []

    def _unreachable(self, hosts: Sequence[Host]) -> list[str]:
        """Probe all hosts at the same time; returns the names of those that do not respond."""
        if not self.policy.probe:
            return []
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            responses = pool.map(self._responds, hosts)
            return [host.name for host, responds in zip(hosts, responses, strict=True)
                    if not responds]

    def _unreachable_hosts_at_fault(self, hosts: Sequence[Host]) -> list[str]:
        """Return the unreachable hosts, or none if all other hosts are unreachable.

        When several other hosts fail at once, the fault is the scheduler or this host's network.
        """
        unreachable = self._unreachable(hosts)
        others = [host.name for host in hosts if not is_mine(host.name)]
        return [] if len(others) > 1 and set(others) <= set(unreachable) else unreachable

    def _unreachable_twice(self, hosts: Sequence[Host]) -> list[str]:
        first = self._unreachable_hosts_at_fault(hosts)
        if not first:
            return []
        return [name for name in self._unreachable_hosts_at_fault(hosts) if name in first]

    def _responds(self, host: Host) -> bool:
        command = split_command("--probe", self.policy.probe, {"host": host.name})
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("--probe", self.policy.probe, f"cannot be started ({exc.strerror})",
                              "name a command with {host}; an empty one disables probing") from exc
        except OSError:
            return True  # this host cannot start a process: that says nothing about the other host
        try:
            return process.wait(PROBE_TIMEOUT_S) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group: `timeout` has a child
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)  # a process that is stuck in the kernel ends later
            return False

    def _attempt(self, attempt: int, hosts: Sequence[Host]) -> int | Failure:
        """Run one attempt; returns 0 or 99 if a mark on disk proves it, otherwise the failure."""
        attempt_dir = self.folder / f"attempt-{attempt}"
        attempt_dir.mkdir()
        with (attempt_dir / "launcher.log").open("wb") as log, ThreadPoolExecutor(1) as pool:
            process = self._launch(attempt_dir, hosts, attempt, log)
            try:
                unreachable, without_record = self._watch(process, attempt_dir, hosts, attempt,
                                                          pool)
                ended = succeeded(attempt_dir)
            finally:
                self._end(process, attempt)

        # Ranks that stop with a checkpoint only now do so because their attempt was ended: that
        # is not a success.
        done = (attempt_dir / "DONE").exists()
        if ended or done or (self.stop_requested and succeeded(attempt_dir)):
            return 0 if done else STOPPED_EXIT_CODE
        failure = diagnose(attempt_dir, process.returncode, hosts, unreachable, without_record)
        # Ranks that the launcher lost exit when they see a newer attempt, or no heartbeat.
        self._send_heartbeats_for(self.policy.patience_s if unreachable else FENCE_S, attempt + 1)
        return failure

    def _launch(self, attempt_dir: Path, hosts: Sequence[Host], attempt: int,
                log: IO[bytes]) -> subprocess.Popen[bytes]:
        (attempt_dir / "hostfile").write_text(format_hostfile(hosts))
        network = interface_environment(self.policy.interface) if self.policy.interface else {}
        forwarded = {}
        for key in FORWARDED:
            value = os.environ.get(key)
            if value and is_shell_safe(value):
                forwarded[key] = value
            elif value:
                self.say(f"{key} = {value!r} is not forwarded through pdsh: "
                         "the remote shell would alter it")
        write_ds_env(attempt_dir / "ds_env", network | forwarded)

        # A new port for each attempt: a lost rank may still hold the previous one.
        port = self.policy.master_port + attempt % 100
        values = {"hostfile": str(attempt_dir / "hostfile"),
                  "master": hosts[0].name,
                  "port": str(port),
                  "hosts": format_mpi_hosts(hosts),
                  "nodelist": ",".join(host.name for host in hosts),
                  "nodes": str(len(hosts)),
                  "ranks": str(sum(host.slots for host in hosts))}
        command = [substitute(word, values) for word in self.command]
        command += ["--supervised", str(attempt_dir)]
        environ = os.environ | network | {"DS_ENV_FILE": str(attempt_dir / "ds_env"),
                                          "MASTER_ADDR": values["master"],
                                          "MASTER_PORT": values["port"]}
        self.say(shlex.join(command))
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("COMMAND", command[0], f"cannot be started ({exc.strerror})",
                              "name a launcher that is installed on this host") from exc
        except OSError as exc:
            raise LaunchError(f"the launcher could not be started ({exc.strerror})\n"
                              "  remedy: check the processes and the memory of this host") from exc

    def _watch(self, process: subprocess.Popen[bytes], attempt_dir: Path, hosts: Sequence[Host],
               attempt: int, pool: ThreadPoolExecutor) -> tuple[list[str], set[str]]:
        """Wait until the launcher ends, or until the grace after the first exit is over.

        Returns the hosts that became unreachable, and the hosts of ranks that neither left an exit record nor aborted.
        (A frozen rank wakes, and leaves a record, only when the launcher ends it.)
        """
        ending_since: float | None = None
        unreachable_once: list[str] = []
        probed_at = time.monotonic()
        probe: Future[list[str]] | None = None
        while process.poll() is None:
            self._send_heartbeat(attempt)
            now = time.monotonic()
            if ending_since is None and (any(attempt_dir.glob("exit-*.json"))
                                         or succeeded(attempt_dir)):
                ending_since = now
            if ending_since is not None and now > ending_since + self.policy.grace_s:
                break
            if probe is None and now - probed_at > self.policy.probe_s:
                probe = pool.submit(self._unreachable_hosts_at_fault, hosts)
            if probe is not None and probe.done():
                unreachable = probe.result()
                probed_at = now
                probe = None
                if twice := [name for name in unreachable if name in unreachable_once]:
                    return twice, set()
                unreachable_once = unreachable
            time.sleep(TICK_S)

        recorded = {record.get("rank") for record in records_of(attempt_dir, "exit", hosts)}
        recorded |= aborted_ranks(attempt_dir)
        without_record = {record["host"] for record in records_of(attempt_dir, "rank", hosts)
                          if record.get("rank") not in recorded}
        unreachable = [] if succeeded(attempt_dir) else self._unreachable_twice(hosts)
        return unreachable, without_record

    def _end(self, process: subprocess.Popen[bytes], attempt: int) -> None:
        """End the launcher and what is left of its process group.

        Ranks whose launcher was killed get the same grace as others. A process that is stuck in
        the kernel, for example on a disk that does not respond, is left behind.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + self.policy.grace_s
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            while _group_lives(process) and time.monotonic() < deadline:
                self._send_heartbeat(attempt)
                time.sleep(TICK_S)
        if process.poll() is None:
            self.say(f"process {process.pid} does not end after SIGKILL; it is left behind")

    def _send_heartbeat(self, attempt: int) -> None:
        if self._lock.check() is not None:
            # This process was suspended, and another supervisor took over. The ranks now read
            # the other one's heartbeat.
            return
        write_json(self.folder / HEARTBEAT_FILE,
                   {"attempt": attempt, "renewed": time.monotonic(), "stop": self.stop_requested,
                    "patience_s": self.policy.patience_s})

    def _send_heartbeats_for(self, seconds: float, attempt: int) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._send_heartbeat(attempt)
            time.sleep(TICK_S)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process group led by ``process`` still has a process that is not a zombie."""
    process.poll()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state not in "ZX":
                return True
    return False


def check_policy(policy: Policy, hosts: Sequence[Host]) -> None:
    """Raise ConfigError when there are fewer hosts than the run needs."""
    if policy.nodes > len(hosts):
        raise ConfigError("--nodes", policy.nodes, f"the hostfile has only {len(hosts)} hosts",
                          "list more hosts, or lower --nodes")
    if not 1 <= policy.min_nodes <= policy.nodes:
        raise ConfigError("--nodes", policy.nodes,
                          f"does not fit --min-nodes {policy.min_nodes}",
                          "choose 1 <= min-nodes <= nodes")
