"""Runs of launch/pretrain.py in real rank processes, with faults, and comparisons of runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.pool import free_port

if TYPE_CHECKING:
    from prelora_ds.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
DEBUG = "launch/recipes/vit_tiny_debug.yaml"
TIMES = ("step_s", "data_s", "img_s", "peak_gib")


class Zygote:
    """A process (zygote.py) that forks ranks in milliseconds. Close it after use."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/zygote.py")],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._started: list[int] = []
        self._news = threading.Condition()
        assert json.loads(self._process.stdout.readline())["ready"] == 1, (
            "the zygote has several threads, so its forks may hang"
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            news = json.loads(line)
            with self._news:
                if "started" in news:
                    self._started.append(news["started"])
                else:
                    self.ended[news["ended"]] = news["code"]
                self._news.notify_all()

    def fork(self, **order: Any) -> int:
        """Fork a rank, and return its process id. order: see zygote.py."""
        with self._news:
            before = len(self._started)
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            assert self._news.wait_for(lambda: len(self._started) > before, timeout=30)
            return self._started[-1]

    def wait(self, pids: Sequence[int], timeout: float, *, every: bool = True) -> bool:
        """Return whether all (or with ``every=False`` any) of the processes ended in time."""
        done = all if every else any
        with self._news:
            return self._news.wait_for(lambda: done(pid in self.ended for pid in pids), timeout)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(30)


class Job:
    """A launch on ``world`` ranks. Like a launcher, it kills all ranks if one exits with an error."""

    def __init__(
        self,
        zygote: Zygote,
        out: Path,
        shards: Path,
        *arguments: str,
        zero: int = 2,
        world: int = 2,
        faults: dict[int, dict[str, Any]] | None = None,
        resume: str = "auto",
        log: str | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.zygote, self.log = (
            zygote,
            Path(log or out.with_name(f"{out.name}.{time.monotonic_ns()}.log")),
        )
        argv = [
            "--recipe",
            DEBUG,
            "--deepspeed_config",
            f"ds_configs/zero{zero}.json",
            "--resume",
            resume,
            f"run.output_dir={out}",
            f"data.train={shards / 'train'}",
            f"data.val={shards / 'val'}",
            *arguments,
        ]
        env = (env or {}) | {
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.pids = [
            zygote.fork(
                env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                argv=argv,
                log=str(self.log),
                fault=(faults or {}).get(r),
            )
            for r in range(world)
        ]

    def wait_for(self, path: Path, timeout: float = 120.0) -> None:
        """Wait until ``path`` exists."""
        deadline = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < deadline and not self.zygote.wait(
                self.pids, 0, every=False
            ), self.said()[-3000:]
            time.sleep(0.02)

    def wait_until_stopped(self, timeout: float = 200.0) -> None:
        """Wait until rank 0 has received the SIGSTOP of its fault."""
        deadline = time.monotonic() + timeout
        while Path(f"/proc/{self.pids[0]}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert not self.zygote.wait(self.pids, 0.05, every=False), self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]

    def end(self, timeout: float = 120.0, grace: float = 0.5) -> list[int]:
        """Wait until all ranks have exited, and return their exit codes by rank."""
        deadline = time.monotonic() + timeout
        while not self.zygote.wait(self.pids, 0.1):
            failed = any(self.zygote.ended.get(pid, 0) != 0 for pid in self.pids)
            if failed:
                self.zygote.wait(self.pids, grace)
            if failed or time.monotonic() > deadline:
                for pid in self.pids:
                    self.kill(pid)
                assert self.zygote.wait(self.pids, 30)
                if not failed:
                    raise AssertionError(f"no end after {timeout:.0f} s: {self.said()[-3000:]}")
        return [self.zygote.ended[pid] for pid in self.pids]

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank, unless it has exited."""
        if pid not in self.zygote.ended:
            os.kill(pid, number)

    def said(self) -> str:
        """Return what the ranks have printed."""
        return self.log.read_text(errors="replace")


@contextmanager
def zygote() -> Iterator[Zygote]:
    """Yield a `Zygote`, and close it at the end."""
    started = Zygote()
    try:
        yield started
    finally:
        started.close()


def traces(out: Path) -> dict[str, Any]:
    """Return the output of a run that depends only on its settings.

    These are the logged rows without times, windows, plans, merges, choices of adapters, observations, and all
    exported bits.
    """
    from prelora_ds.run.folder import RunFolder
    from prelora_ds.run.log import EventKind, read_lines

    folder = RunFolder(out)
    check_replay(folder)
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_lines(folder.metrics)]
    plans = [
        {k: v for k, v in row.items() if k != "switch"}
        for row in read_lines(folder.events_to_read)
        if row["event"] in (EventKind.PLAN, EventKind.MERGE, EventKind.ACTIVE)
    ]
    # Version 0.1.0 did not write observations.
    observations = read_lines(folder.observations) if folder.observations.exists() else []
    return {
        "metrics": rows,
        "windows": read_lines(folder.windows),
        "plans": plans,
        "observations": observations,
        "model": (folder.model / "model.safetensors").read_bytes(),
    }


def check_replay(folder: RunFolder) -> None:
    """Compare the plans of a run with what its own settings decide from its observations.

    A run that an earlier version began has only a part of its observations.
    """
    from prelora_ds.core.codec import to_json
    from prelora_ds.core.replay import replay
    from prelora_ds.reporting.replay import read_logged
    from prelora_ds.run.log import EventKind, read_lines

    events = read_lines(folder.events_to_read)
    began = any(row["event"] == EventKind.FORK or (row["event"], row["step"]) == (EventKind.JOB, 0) for row in events)
    if not began:
        return
    logged = read_logged(folder)
    begins_after = 0 if logged.start is None else logged.start.step
    decided = [
        (each.step, each.state.reason, to_json(each.state.plan) | {"active": None})
        for each in replay(
            logged.controller(logged.config.specs()), logged.observations, logged.start
        ).decisions
    ]
    plans = [
        (row["step"], row["reason"], row["plan"] | {"active": None})
        for row in read_lines(folder.events)
        if row["event"] == EventKind.PLAN and row["step"] > begins_after
    ]
    assert decided == plans


def kill_and_resume(start: Callable[..., Job], step: int) -> None:
    """Kill rank 1 of a run of two ranks in ``step``, and let the same command finish the run.

    start: starts the run, with the faults that it is given.
    """
    killed = start(faults={1: {"place": "step", "call": step, "delay": 0}})
    assert killed.end()[1] == -signal.SIGKILL, killed.said()[-3000:]
    again = start()
    assert again.end() == [0, 0], again.said()[-3000:]
    assert "resuming after step" in again.said()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the names of the parts in which two traces differ, each with the first such row."""
    different = []
    for part in a:
        if a[part] != b[part]:
            pairs = list(zip(a[part], b[part], strict=False)) if isinstance(a[part], list) else []
            first = next(((x, y) for x, y in pairs if x != y), (len(a[part]), len(b[part])))
            different.append(f"{part}: {first}")
    return different
