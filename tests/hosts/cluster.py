"""Several hosts on one machine: each is a network, uts, ipc, pid and mount namespace with its own sshd.

A switch (a namespace with a bridge and no address) connects them. No traffic can leave, and nothing is created in the
machine's own namespaces. Every process dies with the one that created the cluster. Requires root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prelora_ds.hosts.hostfile import Host, format_hostfile

ROOT = Path(__file__).parents[2]
TOOLS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh", "ip", "tc", "nsenter", "unshare", "setpriv")
VENV_BIN = Path(sys.executable).parent
OWN_GROUP = ("setpriv", "--pdeathsig", "KILL")


def why_not() -> str | None:
    """Return why no cluster can be created here, or None."""
    if os.geteuid() != 0:
        return "namespaces and sshd need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)" if missing else None


class Cluster:
    """``host1`` to ``hostN`` at 10.77.0.1 to .N on eth0.

    ``state`` is a folder that all hosts share. In it, each host has its own ``scratch`` (a small disk) and ``site``
    (first in PYTHONPATH). A file in faults/ triggers a fault of that host's rank, if it runs faulty.py.
    """

    def __init__(self, size: int, state: Path) -> None:
        self.names = [f"host{i}" for i in range(1, size + 1)]
        self.state, self.scratch = state, state / "scratch"
        self._spawned: list[subprocess.Popen[bytes]] = []
        self._inits: dict[str, int] = {}
        self._switch = 0

    def __enter__(self) -> Cluster:
        for shared in (self.scratch, self.state / "site", self.state / "faults"):
            shared.mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.state / "key")], check=True)
        public = " ".join((self.state / "key.pub").read_text().split()[:2])
        (self.state / "known_hosts").write_text("".join(
            f"{name},{self.address(name)},decoy{name} {public}\n" for name in self.names))
        holder = subprocess.Popen([*OWN_GROUP, "unshare", "--net", "sleep", "infinity"])
        self._spawned.append(holder)
        self._switch = holder.pid
        _wait_for(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        self._ip("link add br0 type bridge", "link set br0 up")
        for name in self.names:
            self._start(name)
        for name in self.names:
            _wait_for(lambda name=name: (self.state / name / "up").exists())
        for name in self.names:
            _wait_for(lambda name=name: self.run(name, ["ssh", name, "true"]).returncode == 0)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._inits.values():
            _kill(pid, signal.SIGKILL)
        for process in self._spawned:
            process.kill()
            process.wait()

    def address(self, name: str) -> str:
        return f"10.77.0.{name.removeprefix('host')}"

    def hostfile(self, path: Path, slots: int = 1, names: Sequence[str] | None = None) -> Path:
        path.write_text(format_hostfile(Host(name, slots) for name in names or self.names))
        return path

    def start(self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None,
              log: Path | None = None) -> subprocess.Popen[str]:
        """Start ``command`` on host ``name``, in the repository; its output goes to a pipe, or to ``log``."""
        inside = ["nsenter", "-t", str(self._inits[name]), "-a", "env", f"--chdir={ROOT}", "-i",
                  *(f"{key}={value}" for key, value in {**self.environ(), **(env or {})}.items()), *map(str, command)]
        out = subprocess.PIPE if log is None else log.open("a")
        return subprocess.Popen([*OWN_GROUP, *inside], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                text=True)

    def run(self, name: str, command: Sequence[str | Path], env: Mapping[str, str] | None = None,
            timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``command`` to its end; output and errors are both in ``stdout``."""
        process = self.start(name, command, env)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out)

    def environ(self) -> dict[str, str]:
        """Return the environment of a command on a host: only the paths come from this machine's own."""
        return {"PATH": f"{VENV_BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TMPDIR": f"{self.scratch}/tmp",
                "PYTHONPATH": f"{self.state}/site:{ROOT}", "FAULTS": f"{self.state}/faults",
                "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1",
                "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv/torch_extensions")),
                "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"}

    def alive(self, name: str) -> bool:
        return os.path.exists(f"/proc/{self._inits[name]}/ns/pid") and _namespace(self._inits[name]) is not None

    # Faults

    def kill(self, name: str) -> None:
        """Kill all processes of the host at once; the kernel closes its connections."""
        _kill(self._inits[name], signal.SIGKILL)

    def power_off(self, name: str) -> None:
        """Make the host silent: no other host learns that its connections are gone."""
        self.link(name, up=False)
        self.kill(name)

    def link(self, name: str, up: bool) -> None:
        self._ip(f"link set p{name} {'up' if up else 'down'}")

    def pids(self, name: str, words: str = "") -> list[int]:
        """Return process ids, as seen from outside, of the host's processes with ``words`` in their command line.

        Its init is not included.
        """
        space = os.readlink(f"/proc/{self._inits[name]}/ns/pid")
        return [pid for pid in _all_pids() if pid != self._inits[name] and _namespace(pid) == space
                and words in _command_line(pid)]

    def freeze(self, name: str, signal_number: int = signal.SIGSTOP) -> None:
        for pid in self.pids(name):
            _kill(pid, signal_number)

    def slow_link(self, name: str, mbit_s: int | None) -> None:
        """Limit the bandwidth to the host; None removes the limit."""
        self._switch_run(f"tc qdisc replace dev p{name} root tbf rate {mbit_s}mbit burst 64kb latency 50ms"
                         if mbit_s else f"tc qdisc del dev p{name} root")

    @contextlib.contextmanager
    def slow_processes(self, pids: Sequence[int], share: float) -> Iterator[None]:
        """Limit these processes together to a share of a core, with a temporary cgroup of the machine."""
        group = Path(f"/sys/fs/cgroup/cpu/prelora-{os.getpid()}-{time.monotonic_ns()}")
        group.mkdir()
        try:
            (group / "cpu.cfs_period_us").write_text("10000")  # short, so that each step is slow throughout
            (group / "cpu.cfs_quota_us").write_text(str(int(10000 * share)))
            for pid in pids:
                (group / "cgroup.procs").write_text(str(pid))
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(OSError):  # it has ended
                    (group.parent / "cgroup.procs").write_text(str(pid))
            _wait_for(lambda: not (group / "cgroup.procs").read_text())
            group.rmdir()

    def add_decoy(self, name: str, address: str) -> None:
        """Add an address that is first in ``hostname -I`` and that no other host can reach."""
        own = f"{self.address(name)}/24 dev eth0"
        self._in_host(name, f"addr del {own}; addr add {address}/24 dev eth0; addr add {own}")

    def _start(self, name: str) -> None:
        own = self.state / name
        own.mkdir()
        (own / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{self.address(other)} {other}\n" for other in self.names))
        (own / "bashrc").touch()
        (own / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.state}/key\n UserKnownHostsFile {self.state}/known_hosts\n BatchMode yes\n"
            " StrictHostKeyChecking yes\n ConnectTimeout 5\n LogLevel ERROR\n")
        (own / "sshd_config").write_text(
            f"HostKey {self.state}/key\nAuthorizedKeysFile {self.state}/key.pub\nStrictModes no\nPermitRootLogin yes\n"
            "UsePAM no\nMaxStartups 200\nMaxSessions 200\nPasswordAuthentication no\nPidFile none\nPrintMotd no\n"
            f"SetEnv PATH={self.environ()['PATH']} TMPDIR={self.scratch}/tmp OMPI_ALLOW_RUN_AS_ROOT=1 "
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n")
        outer = subprocess.Popen(
            [*OWN_GROUP, "unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child=KILL",
             sys.executable, str(Path(__file__).with_name("init.py")), str(self.state), name],
            stdin=subprocess.DEVNULL, stdout=(own / "log").open("w"), stderr=subprocess.STDOUT, env=self.environ())
        self._spawned.append(outer)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        _wait_for(lambda: bool(children.read_text().split()))
        self._inits[name] = int(children.read_text().split()[0])
        self._ip(f"link add p{name} type veth peer name eth0 netns {self._inits[name]}",
                 f"link set p{name} master br0", f"link set p{name} up")
        self._in_host(name, f"addr add {self.address(name)}/24 dev eth0; link set eth0 up")

    def _ip(self, *commands: str) -> None:
        for command in commands:
            self._switch_run(f"ip {command}")

    def _switch_run(self, command: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._switch), "-n", *command.split()], check=True)

    def _in_host(self, name: str, commands: str) -> None:
        for command in commands.split(";"):
            subprocess.run(["nsenter", "-t", str(self._inits[name]), "-n", "ip", *command.split()], check=True)


def _wait_for(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a test host did not come up")
        time.sleep(0.02)


def _kill(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
