"""Worker processes, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BODY = r"""
import os, time
from prelora_ds.data.parallel import map_unordered

def job(seconds):
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece: others write there too
    time.sleep(seconds)
    return seconds

if __name__ == "__main__":
    for seconds in map_unordered(job, [0.0, 0.0, 60.0, 60.0], 2):
        os.write(1, b"done\n")
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "body.py").write_text(BODY)
    process = subprocess.Popen([sys.executable, tmp_path / "body.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(6)]
    workers = {int(line) for line in said if line != "done"}
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in workers):
        assert time.monotonic() < deadline, [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
