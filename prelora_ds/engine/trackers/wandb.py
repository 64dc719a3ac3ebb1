"""Weights & Biases as a tracker."""

from __future__ import annotations

import netrc
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from prelora_ds.engine.trackers.base import Event, deepspeed_monitor
from prelora_ds.engine.trackers.service import CLOSE_S, Service, environment, without_prompts

FLUSH_S = 1.0  # after which figures are on the disk


class Wandb(Service):
    """Weights & Biases: a run whose steps are numbers of samples."""

    key = "wandb"
    title = "W&B"

    def _users_choice(self) -> tuple[bool, str] | None:
        mode = os.environ.get("WANDB_MODE")
        if not mode:
            return None
        return mode not in ("offline", "dryrun"), f"WANDB_MODE is {mode}"

    def _address(self) -> str:
        return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"

    def _has_key(self) -> bool:
        if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return True
        try:
            known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
        except (OSError, netrc.NetrcParseError):
            return False
        return known.authenticators(urlsplit(self._address()).netloc) is not None

    def _unsent(self) -> bool:
        recorded = (self._folder / "wandb").glob("offline-run-*/*.wandb")
        # W&B 0.31 marks what was synced. A file of 7 bytes has nothing but its header.
        return any(path.stat().st_size > 7 and not Path(f"{path}.synced").exists() for path in recorded)

    def _start(self, run: str) -> None:
        fixed = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow", "WANDB_DIR": str(self._folder)}
        defaults = {
            "WANDB_MODE": "online" if self._online else "offline",
            "WANDB_NAME": self._name,
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",  # the run keeps its standard output itself
            "WANDB_INIT_TIMEOUT": str(int(CLOSE_S)),
            "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": str(FLUSH_S),
        }
        with environment(fixed, defaults), without_prompts():
            self._monitor = deepspeed_monitor(wandb={"project": self._project})

    def _hand_over(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)
        # W&B completes a step when the next one begins, which may be hours later.
        self._monitor.wandb_monitor.log({}, step=events[-1][2], commit=True)

    def _finish(self) -> None:
        import wandb

        wandb.finish()

    def _sync_command(self) -> str:
        return f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}"
