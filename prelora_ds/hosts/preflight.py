"""`prelora preflight`: what would stop, or slow, a run on these hosts, found in less than a minute."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from prelora_ds.errors import ConfigError
from prelora_ds.hosts.hostfile import Host, fill_command

CLOCK_S = 1.0
SLOW = 0.5  # of the median bandwidth
LEAST_FREE_GIB = 0.05
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5 -o ServerAliveCountMax=2 {host}"


@dataclass(frozen=True)
class Questions:
    """What the run needs of a host. ``folder``: on a disk that all share, such as that of run.output_dir."""

    folder: Path
    scratch: Sequence[str] = ()
    shards: Sequence[str] = ()
    extensions: Sequence[str] = ()
    interface: str | None = None
    master_port: int = 29500
    timeout_s: float = 45.0
    ssh: str = SSH


@dataclass
class Report:
    """Answers and problems of each host, in the order of the hostfile."""

    hosts: list[str]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fit(self) -> bool:
        return not any(self.problems.values())

    def to_json(self) -> dict[str, Any]:
        return {"fit": self.fit, "seconds": round(self.seconds, 1),
                "hosts": {host: {"problems": self.problems[host], **self.answers[host]} for host in self.hosts}}


class _Line:
    """The conversation with one host."""

    def __init__(self, host: str, ssh: str) -> None:
        remote = [f"cd {shlex.quote(os.getcwd())}"]
        remote += [f"export {key}={shlex.quote(os.environ[key])}" for key in ("PYTHONPATH", "TORCH_EXTENSIONS_DIR")
                   if key in os.environ]
        remote += [f"exec {shlex.quote(sys.executable)} -m prelora_ds.hosts.hostcheck"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the line is open)
        command = fill_command("--ssh", ssh, {"host": host})
        try:
            self.process = subprocess.Popen([*command, "; ".join(remote)], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=self.errors)
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError("--ssh", ssh, f"cannot be started ({exc.strerror})",
                              "install it, or name another command with {host} in it") from exc

    def ask(self, name: str, timeout_s: float, **question: Any) -> dict[str, Any]:
        """The answer, or {"error": ...}, also when none came in time."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write((json.dumps({"ask": name, **question}) + "\n").encode())
            self.process.stdin.flush()
        except OSError:
            return {"error": self._why()}
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            return {"error": f"no answer to `{name}` in {timeout_s:.0f} s"}
        line = self.process.stdout.readline()
        try:
            answer: dict[str, Any] = json.loads(line) if line else {"error": self._why()}
            return answer
        except ValueError:
            return {"error": f"its shell printed {line[:80]!r} before the answer: a login script that prints?"}

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # ssh had ended when it was asked: the question is still to be flushed
            self.process.stdin.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)  # one that the kernel holds ends later

    def _why(self) -> str:
        self.process.poll()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"ssh ended with {self.process.poll()}"


def preflight(hosts: Sequence[Host], questions: Questions) -> Report:
    """Ask all hosts at once, question by question; those that fail one are not asked the next."""
    begun, names = time.monotonic(), [host.name for host in hosts]
    report = Report(names, {name: {} for name in names}, {name: [] for name in names})
    token = questions.folder / f".preflight.{uuid.uuid4().hex}"
    token.write_text(token.name)
    lines = {name: _Line(name, questions.ssh) for name in names}
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            _converse(report, lines, pool, questions, token, {host.name: host.slots for host in hosts})
    finally:
        for line in lines.values():
            line.close()
        token.unlink()
    report.seconds = time.monotonic() - begun
    return report


def _converse(report: Report, lines: Mapping[str, _Line], pool: ThreadPoolExecutor, q: Questions, token: Path,
              slots: Mapping[str, int]) -> None:
    def ask(names: Sequence[str], what: str, own: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
            **question: Any) -> list[str]:
        """Ask all of ``names`` at once, each with ``own``; returns those whose answer is no error."""
        answers = pool.map(lambda name: lines[name].ask(what, q.timeout_s, **question, **own.get(name, {})), names)
        for name, answer in zip(names, answers, strict=True):
            report.answers[name][what] = answer
            if "error" in answer:
                report.problems[name].append(f"{WORDS[what].format(**question)}: {answer['error']}")
        return [name for name in names if "error" not in report.answers[name][what]]

    alive = ask(report.hosts, "clock")
    for name in alive:  # again, now that it answers at once: half the round trip is the error
        sent = time.time()
        there = lines[name].ask("clock", q.timeout_s).get("time", sent)
        report.answers[name]["clock"] = {"offset_s": round(there - (sent + time.time()) / 2, 3)}
    alive = ask(alive, "facts", disks=[str(q.folder), *q.scratch], token=str(token), shards=list(q.shards),
                interface=q.interface, extensions=list(q.extensions))
    for name, problems in problems_of(report.answers, alive, token.name, slots).items():
        report.problems[name] += problems
    if not alive:
        return
    master, port = alive[0], q.master_port
    if not ask([master], "port", port=port) or not ask([master], "listen", port=port):
        return
    alive = [master, *ask(alive[1:], "reach", master=master, port=port, limit_s=5.0)]
    own = {name: {"rank": rank} for rank, name in enumerate(alive)}
    alive = ask(alive, "all_reduce", own, master=master, port=port, interface=q.interface, world=len(alive),
                limit_s=q.timeout_s / 2)
    for name, problem in slow_hosts({name: report.answers[name]["all_reduce"] for name in alive}).items():
        report.problems[name].append(problem)


WORDS = {"clock": "not reachable, or without this Python", "facts": "could not tell about itself",
         "port": "port {port} is not free", "listen": "cannot listen on port {port}",
         "reach": "cannot reach the master {master}:{port}", "all_reduce": "the all-reduce failed"}


def problems_of(answers: Mapping[str, Mapping[str, Any]], alive: Sequence[str], token: str,
          slots: Mapping[str, int]) -> dict[str, list[str]]:
    """Problems of each host, its answers held against those of the majority."""
    found: dict[str, list[str]] = {name: [] for name in alive}
    facts = {name: answers[name]["facts"] for name in alive}
    for name, fact in facts.items():
        say = found[name].append
        if str(fact["address"]).startswith(("127.", "unknown")):
            say(f"its name {fact['name']} points to {fact['address']}: mend /etc/hosts, or set launch.interface")
        if not fact["interface"]:
            say("has no such interface as launch.interface")
        if abs(offset := answers[name]["clock"]["offset_s"]) > CLOCK_S:
            say(f"its clock is {offset:+.1f} s off")
        if fact["shared"] != token:
            say("does not see the files of the first host: run.output_dir is not on a shared disk")
        for path, state in fact["disks"].items():
            if "error" in state:
                say(f"{path} cannot be written: {state['error']}")
            elif state["free_gib"] < LEAST_FREE_GIB:
                say(f"{path} has {state['free_gib']} GiB left")
        for path, state in fact["shards"].items():
            if state.startswith("error"):
                say(f"shards {path}: {state}")
        for op, folder in fact["extensions"].items():
            if folder is None:
                say(f"DeepSpeed's {op} is not built: TORCH_EXTENSIONS_DIR, or build it before the job")
        if 0 < len(fact["accelerators"]) != slots[name]:
            say(f"has {len(fact['accelerators'])} accelerators, and the hostfile says slots={slots[name]}")
    compared = [(what, {name: fact[what] for name, fact in facts.items()}) for what in ("accelerators", "cores")]
    compared += [(key, {name: fact["make"].get(key) for name, fact in facts.items()}) for key in _keys(facts)]
    for what, values in compared:
        usual = _majority(list(values.values()))
        for name, value in values.items():
            if value != usual:
                found[name].append(f"{what} {value}, on the others {usual}")
    least = median([fact["memory_gib"] for fact in facts.values()] or [0.0]) / 2
    for name, fact in facts.items():
        if fact["memory_gib"] < least:
            found[name].append(f"{fact['memory_gib']} GiB of memory free, less than half of the others'")
    return found


def slow_hosts(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Hosts whose better neighbour still gives less than half of the median bandwidth, or that sum wrongly."""
    best = {name: max(answer["neighbours_mb_s"], default=0.0) for name, answer in answers.items()}
    usual = median(best.values()) if best else 0.0
    slow = {name: f"slow: {rate:.0f} MB/s with its better neighbour, the median is {usual:.0f}"
            for name, rate in best.items() if rate < SLOW * usual}
    return slow | {name: "its all-reduce gave a wrong sum" for name, a in answers.items() if not a["correct"]}


def _keys(facts: Mapping[str, Any]) -> list[str]:
    return sorted({key for fact in facts.values() for key in fact["make"]})


def _majority(values: Sequence[Any]) -> Any:
    texts = [json.dumps(value) for value in values]
    return json.loads(max(texts, key=texts.count)) if texts else None


def print_preflight(report: Report) -> None:
    """One table, and every problem with its host."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(report.hosts)} hosts, {report.seconds:.1f} s", title_justify="left")
    for column in ("host", "address", "accelerators", "memory", "disk write", "clock", "neighbours", "all-reduce", ""):
        table.add_column(column, justify="left" if column in ("host", "address", "") else "right")
    for host in report.hosts:
        answers = report.answers[host]
        fact, rate = answers.get("facts", {}), answers.get("all_reduce", {})
        writes = [state["write_s"] for state in fact.get("disks", {}).values() if "write_s" in state]
        table.add_row(host, str(fact.get("address", "")),
                      str(len(fact["accelerators"])) if "accelerators" in fact else "",
                      f"{fact['memory_gib']} GiB" if "memory_gib" in fact else "", f"{max(writes)} s" if writes else "",
                      f"{answers['clock']['offset_s']:+.3f} s" if "offset_s" in answers.get("clock", {}) else "",
                      " ".join(f"{value:.0f}" for value in rate.get("neighbours_mb_s", [])),
                      f"{rate['all_reduce_mb_s']:.0f} MB/s" if "all_reduce_mb_s" in rate else "",
                      "fit" if not report.problems[host] else "NOT FIT")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for host in report.hosts:
        for problem in report.problems[host]:
            console.print(f"{host}: {problem}", highlight=False, markup=False)
