"""launch/pretrain.py with steps of at least 0.1 s, and with faults.

A test creates a file in FAULTS: HOST makes the rank on that host raise, HOST.late keeps it from starting.
"""

import os
import runpy
import socket
import sys
import time
from pathlib import Path

from prelora_ds.data.loader import TrainLoader

fault = Path(os.environ["FAULTS"]) / socket.gethostname()
late = fault.with_suffix(".late")
following = TrainLoader.next


def next_or_fault(self):
    time.sleep(0.1)
    if fault.exists():
        fault.unlink()
        raise RuntimeError("a test raised this")
    return following(self)


if late.exists():
    late.unlink()
    time.sleep(3600)
TrainLoader.next = next_or_fault
sys.argv[0] = str(Path(__file__).parents[2] / "launch" / "pretrain.py")
runpy.run_path(sys.argv[0], run_name="__main__")
