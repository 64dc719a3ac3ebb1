"""A process that has imported everything that a run needs, and forks ranks on request.

It reads and writes lines of JSON:

    python zygote.py    XX
                            whenever a rank ends: {"ended": PID, "code": CODE}; a signal is negative
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEAD_PIPE = "a pipe that nobody reads"
# A variable of the environment of ranks that use torch's own BF16 products on any CPU, as version 0.1.0 did.
NATIVE_PRODUCTS = "NATIVE_PRODUCTS"
# Everything that a run imports.
IMPORTS = (
    "prelora_ds.start",
    "prelora_ds.run.claim",
    "prelora_ds.train",
    "prelora_ds.reporting.table",
    # What a run imports later, when it first needs it.
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft.utils.transformers_weight_conversion",
    "prelora_ds.hosts.arguments",
    "prelora_ds.hosts.exits",
    "prelora_ds.run.method_fits",
    "torch.utils.tensorboard",
)
# Place where a rank may be killed -> the module and the function, as the caller of it looks it up.
PLACES = {
    "step": ("prelora_ds.engine.engine", "Engine.finish_step"),
    "write": ("prelora_ds.run.checkpoints.saver", "write_part"),
    "commit": ("prelora_ds.run.checkpoints.saver", "commit"),
    "vote": ("prelora_ds.run.checkpoints.saver", "Saver.commit_if_all_wrote"),
    "copy": ("prelora_ds.run.checkpoints.saver", "copy_state"),
    "switch": ("prelora_ds.run.decide", "transition"),
    "merge": ("prelora_ds.run.decide", "merge_adapters"),
    "choice": ("prelora_ds.engine.engine", "Engine.set_active"),
    "base": ("prelora_ds.run.checkpoints.saver", "Saver.save_frozen"),
    "window": ("prelora_ds.train", "decide"),
    "evaluate": ("prelora_ds.train", "evaluate_engine"),
    "restore": ("prelora_ds.run.checkpoints.resume", "read_state"),
    "export": ("prelora_ds.train", "export_model"),
}


def main() -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        importlib.import_module(name)
    # A rank collects garbage before its first step. It would look at all that was imported, and copy its pages.
    gc.collect()
    gc.freeze()
    answer(ready=len(os.listdir("/proc/self/task")))
    buffer = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    os.setsid()
                    rank(**order)
                answer(started=pid)
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            continue
        if pid:
            answer(ended=pid, code=os.waitstatus_to_exitcode(status))


def answer(**fields: Any) -> None:
    """Write one line of JSON."""
    print(json.dumps(fields), flush=True)


def rank(env: dict[str, str], argv: list[str], log: str, fault: dict[str, Any] | None) -> None:
    """Run launch/pretrain.py as the main program of this process, and exit."""
    if log == DEAD_PIPE:
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.environ |= env
    code = 1
    try:
        if NATIVE_PRODUCTS in env:
            importlib.import_module("prelora_ds.engine.runtime").lacks_bf16_products = lambda: False
        if fault is not None:
            plant(**fault)
        sys.argv = ["launch/pretrain.py", *argv]
        runpy.run_path(str(ROOT / "launch/pretrain.py"), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    threading._shutdown()  # type: ignore[attr-defined]  # Python waits for threads at exit
    os._exit(code)


def plant(place: str, call: int, delay: float, signal: int = signal.SIGKILL) -> None:
    """Send this process ``signal`` ``delay`` seconds after the ``call``-th call at ``place`` begins."""
    module, path = PLACES[place]
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, name)
    calls = [0]

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            if delay == 0:
                os.kill(os.getpid(), signal)
            else:
                threading.Thread(target=die, daemon=True).start()
        return real(*args, **kwargs)

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    main()
