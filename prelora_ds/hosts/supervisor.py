"""`prelora supervise`: on the first host, start a run with any launcher, watch it, and start it again on healthy hosts.

What counts as success is what the ranks leave on disk (DONE, STOPPED), never the launcher's exit code, which was seen
to be 0 when pdsh had been killed.
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
from prelora_ds.hosts.diagnosis import Failure, diagnose, records_of, succeeded
from prelora_ds.hosts.heartbeat import LEASE, LOCK, attempt_of, write_json
from prelora_ds.hosts.hostfile import (
    Host,
    fill,
    fill_command,
    format_hostfile,
    format_mpi_hosts,
    travels,
    write_ds_env,
)
from prelora_ds.hosts.lock import Lock
from prelora_ds.hosts.network import interface_environment, is_mine

TICK_S = 0.5
FENCE_S = 6.0  # a rank's guard looks at the lease every 5 s
ANSWER_S = 30.0  # for a probe; those of the Slurm profiles have a limit of their own of 20 s
FORWARDED = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "LD_LIBRARY_PATH", "PATH")
PROBE = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true"


@dataclass(frozen=True)
class Policy:
    """How patient the supervisor is; seconds.

    nodes: hosts of the run, the others are spares; min_nodes: with fewer the run goes on where the batch divides.
    patience_s: a rank that sees no change of the lease for so long ends, and so long are hosts looked for when too few
    answer. grace_s: between an end and SIGTERM, and again between that and SIGKILL. probe_s: hosts are probed so often
    while the run goes; two silences end the attempt.
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
    """``folder``: shared by all hosts. ``progress``: a mark that changes with each checkpoint. ``fits``: may so many
    ranks run it. ``say`` prints."""

    command: Sequence[str]
    hosts: Sequence[Host]
    folder: Path
    policy: Policy
    progress: Callable[[], object]
    fits: Callable[[int], bool]
    say: Callable[[str], None]
    failures: Counter[str] = field(default_factory=Counter)
    stop_asked: bool = False

    def __post_init__(self) -> None:
        self._mine = Lock(self.folder / LOCK)

    def run(self) -> int:
        """Attempts until one succeeds; returns the exit code: 0, 99 (stopped with a checkpoint), or a failure's.

        Raises LaunchError when another supervisor has the run (a newer attempt would end its ranks), or
        the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mine.take()
            try:
                return self._attempts()
            finally:
                self._mine.release()
        except OSError as exc:
            raise LaunchError(f"{exc.filename or self.folder} cannot be written ({exc.strerror})\n"
                              "  remedy: make room, and start the same command again") from exc

    def _attempts(self) -> int:
        first = 1 + max((attempt_of(path) or 0 for path in self.folder.iterdir()), default=0)
        former: tuple[object, object] | None = None
        for attempt in range(first, first + self.policy.max_restarts + 1):
            self._renew(attempt)
            chosen = self._choose_hosts(attempt)
            self.say(f"attempt {attempt}: {len(chosen)} hosts: {', '.join(host.name for host in chosen)}")
            outcome = self._attempt(attempt, chosen)
            if isinstance(outcome, int):
                return outcome
            failure = outcome
            where = f" on {', '.join(failure.hosts)}" if failure.hosts else ""
            self.say(f"attempt {attempt} failed{where} (exit code {failure.code}): {failure.why}")
            if (lost := self._mine.check()) is not None:
                self.say(lost[1])
                return lost[0]
            write_json(self.folder / f"attempt-{attempt}" / "failure.json", vars(failure))
            if failure.code == USAGE_EXIT_CODE or self.stop_asked:
                return failure.code
            now = ((failure.code, failure.kind), self.progress())
            if now == former:
                self.say("the same failure twice, and no checkpoint between: given up")
                return failure.code
            former = now
            self.failures.update(failure.hosts)
        self.say(f"{self.policy.max_restarts} restarts are used up: given up")
        return failure.code

    def _choose_hosts(self, attempt: int) -> list[Host]:
        """The first healthy hosts, those that failed before last. Raises LaunchError when there stay too few."""
        deadline, said = time.monotonic() + self.policy.patience_s, set[str]()
        while True:
            silent = self._unanswered(self.hosts)
            for name in [name for name in silent if name not in said]:
                self.say(f"host {name} does not answer")
            said.update(silent)
            chosen = self._choose_from([host for host in self.hosts if host.name not in silent])
            left = deadline - time.monotonic()
            if len(chosen) == self.policy.nodes or self.stop_asked or left <= 0:
                break
            self._renew_for(min(left, self.policy.probe_s), attempt)  # what is silent may be a scheduler that restarts
        if chosen:
            return chosen
        raise LaunchError(f"{len(self.hosts) - len(silent)} of {len(self.hosts)} hosts answer, and the run needs "
                          f"{self.policy.nodes}" + (f" (at least {self.policy.min_nodes}, where the batch divides)"
                                                    if self.policy.min_nodes < self.policy.nodes else "")
                          + f"; silent: {', '.join(silent) or 'none'}\n  remedy: more spares, or a smaller --min-nodes")

    def _choose_from(self, hosts: Sequence[Host]) -> list[Host]:
        healthy = sorted(hosts, key=lambda host: self.failures[host.name])
        for count in range(min(self.policy.nodes, len(healthy)), self.policy.min_nodes - 1, -1):
            chosen = healthy[:count]
            if self.fits(sum(host.slots for host in chosen)):
                return sorted(chosen, key=self.hosts.index)
        return []

    def _unanswered(self, hosts: Sequence[Host]) -> list[str]:
        if not self.policy.probe:
            return []
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return [host.name for host, answers in zip(hosts, pool.map(self._answers, hosts), strict=True)
                    if not answers]

    def _silent(self, hosts: Sequence[Host]) -> list[str]:
        silent = self._unanswered(hosts)
        others = [host.name for host in hosts if not is_mine(host.name)]
        # All of several others at once: that is a scheduler or this host's network, and tells of no host.
        return [] if len(others) > 1 and set(others) <= set(silent) else silent

    def _silent_twice(self, hosts: Sequence[Host]) -> list[str]:
        suspects = self._silent(hosts)
        return [name for name in self._silent(hosts) if name in suspects] if suspects else []

    def _answers(self, host: Host) -> bool:
        command = fill_command("--probe", self.policy.probe, {"host": host.name})
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("--probe", self.policy.probe, f"cannot be started ({exc.strerror})",
                              "name a command with {host} in it, or an empty one for none") from exc
        except OSError:
            return True  # no process to be had here: nothing was heard of that host
        try:
            return process.wait(ANSWER_S) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started: `timeout` has a child
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)  # one that the kernel holds ends later
            return False

    def _attempt(self, attempt: int, hosts: Sequence[Host]) -> int | Failure:
        """One start to its end; 0 or 99 where a marker proves it."""
        own = self.folder / f"attempt-{attempt}"
        own.mkdir()
        with (own / "launcher.log").open("wb") as log, ThreadPoolExecutor(1) as pool:
            process = self._launch(own, hosts, attempt, log)
            try:
                silent, unheard = self._watch(process, own, hosts, attempt, pool)
                ended = succeeded(own)
            finally:
                self._end(process, attempt)
        # Ranks that only now stop with a checkpoint do so because their attempt is ended.
        if ended or (own / "DONE").exists() or (self.stop_asked and succeeded(own)):
            return 0 if (own / "DONE").exists() else STOPPED_EXIT_CODE
        failure = diagnose(own, process.returncode, hosts, silent, unheard)
        # Ranks that the launcher lost end when they see that their attempt is over, or see nothing of it any more.
        self._renew_for(self.policy.patience_s if silent else FENCE_S, attempt + 1)
        return failure

    def _launch(self, own: Path, hosts: Sequence[Host], attempt: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        (own / "hostfile").write_text(format_hostfile(hosts))
        network = interface_environment(self.policy.interface) if self.policy.interface else {}
        forwarded = {key: os.environ[key] for key in FORWARDED if os.environ.get(key)}
        for key in [key for key, value in forwarded.items() if not travels(value)]:
            self.say(f"{key} = {forwarded.pop(key)!r} is not passed on to pdsh's hosts: a remote shell would change it")
        write_ds_env(own / "ds_env", network | forwarded)
        port = self.policy.master_port + attempt % 100  # a port that a lost rank still holds stops nothing
        words = {"hostfile": str(own / "hostfile"), "master": hosts[0].name, "port": str(port),
                 "hosts": format_mpi_hosts(hosts), "nodelist": ",".join(host.name for host in hosts),
                 "nodes": str(len(hosts)), "ranks": str(sum(host.slots for host in hosts))}
        command = [fill(word, words) for word in self.command] + ["--supervised", str(own)]
        environ = os.environ | network | {"DS_ENV_FILE": str(own / "ds_env"), "MASTER_ADDR": words["master"],
                                          "MASTER_PORT": words["port"]}
        self.say(shlex.join(command))
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("COMMAND", command[0], f"cannot be started ({exc.strerror})",
                              "name a launcher that is installed on this host") from exc
        except OSError as exc:
            raise LaunchError(f"the launcher could not be started ({exc.strerror})\n"
                              "  remedy: look at the processes and the memory of this host") from exc

    def _watch(self, process: subprocess.Popen[bytes], own: Path, hosts: Sequence[Host], attempt: int,
               pool: ThreadPoolExecutor) -> tuple[list[str], set[str]]:
        """Until the launcher ends or the grace after an end is over; returns hosts that fell silent, and hosts of ranks
        that left no record by then (a frozen one wakes, and leaves one, when the launcher ends it)."""
        ending: float | None = None
        suspects: list[str] = []
        probed = time.monotonic()
        probe: Future[list[str]] | None = None
        while process.poll() is None:
            self._renew(attempt)
            now = time.monotonic()
            if ending is None and (any(own.glob("exit-*.json")) or succeeded(own)):
                ending = now + self.policy.grace_s
            if ending is not None and now > ending:
                break
            if probe is None and now - probed > self.policy.probe_s:
                probe = pool.submit(self._silent, hosts)
            if probe is not None and probe.done():
                silent, probed, probe = probe.result(), now, None
                if both := [name for name in silent if name in suspects]:
                    return both, set()
                suspects = silent
            time.sleep(TICK_S)
        told = {record.get("rank") for record in records_of(own, "exit", hosts)}
        unheard = {record["host"] for record in records_of(own, "rank", hosts) if record.get("rank") not in told}
        return ([] if succeeded(own) else self._silent_twice(hosts)), unheard

    def _end(self, process: subprocess.Popen[bytes], attempt: int) -> None:
        """End the launcher and what is left of its process group.

        Ranks whose launcher was killed get the same grace as others. A process that the kernel
        holds, such as by a disk that does not answer, is left behind.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + self.policy.grace_s
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            while _group_lives(process) and time.monotonic() < deadline:
                self._renew(attempt)
                time.sleep(TICK_S)
        if process.poll() is None:
            self.say(f"process {process.pid} does not end after SIGKILL; it is left behind")

    def _renew(self, attempt: int) -> None:
        if self._mine.check() is not None:
            return  # this process stood still, and another supervisor took over: the ranks look at its lease now
        write_json(self.folder / LEASE, {"attempt": attempt, "renewed": time.monotonic(), "stop": self.stop_asked,
                                         "patience_s": self.policy.patience_s})

    def _renew_for(self, seconds: float, attempt: int) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._renew(attempt)
            time.sleep(TICK_S)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the group that ``process`` leads is left; a zombie is not."""
    process.poll()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state not in "ZX":
                return True
    return False


def check_policy(policy: Policy, hosts: Sequence[Host]) -> None:
    """Raise ConfigError when there are fewer hosts than the run needs."""
    if not 1 <= policy.min_nodes <= policy.nodes <= len(hosts):
        raise ConfigError("--nodes", policy.nodes, f"does not fit --min-nodes {policy.min_nodes}, {len(hosts)} hosts",
                          "1 <= min-nodes <= nodes <= hosts in the hostfile")
