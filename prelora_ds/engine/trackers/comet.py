"""Comet as a tracker."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.engine.trackers.base import Event, deepspeed_monitor
from prelora_ds.engine.trackers.service import CLOSE_S, Service, environment, without_prompts


class Comet(Service):
    """Comet: an experiment whose steps are numbers of samples.

    Offline, Comet 3.58 writes its messages into a temporary folder and makes an archive of them at
    the end. Here that folder is in the run, and the next job archives what a killed job has left.
    """

    key = "comet"
    title = "Comet"

    @property
    def _archives(self) -> Path:
        return self._folder / "comet"

    @property
    def _unfinished(self) -> Path:
        return self._archives / "unfinished"

    def _setting(self, name: str) -> Any:
        """Return a setting of Comet, from its environment variables or its config files; None if it is not set."""
        with environment({}, COMET_SETTINGS):
            from comet_ml.config import get_config

            return get_config(name)

    def _users_choice(self) -> tuple[bool, str] | None:
        online = self._setting("comet.start.online")
        return None if online is None else (online, f"COMET_START_ONLINE is {online}")

    def _address(self) -> str:
        return self._setting("comet.url_override") or "https://www.comet.com"

    def _has_key(self) -> bool:
        return bool(self._setting("comet.api_key"))

    def _tidy(self) -> None:
        for archive in self._archives.glob("*.zip"):  # Comet begins with an empty one
            if not zipfile.is_zipfile(archive) or not zipfile.ZipFile(archive).namelist():
                archive.unlink()
        for folder in self._unfinished.glob("*"):
            messages = folder / "messages.json"
            if (folder / "experiment.json").is_file() and messages.is_file():
                written = messages.read_bytes()
                messages.write_bytes(written[: written.rfind(b"\n") + 1])
                shutil.make_archive(str(self._archives / f"killed-{folder.name}"), "zip", folder)
            shutil.rmtree(folder)

    def _unsent(self) -> bool:
        return any(self._archives.glob("*.zip"))

    def _start(self, run: str) -> None:
        for folder in (self._unfinished, self._archives / "uploaded"):
            folder.mkdir(parents=True, exist_ok=True)
        fixed = {"COMET_OFFLINE_DIRECTORY": str(self._archives)}
        former = tempfile.tempdir
        if not self._online:
            tempfile.tempdir = str(self._unfinished)
        try:
            with environment(fixed, COMET_SETTINGS), without_prompts():
                self._monitor = deepspeed_monitor(comet={
                    "samples_log_interval": 1,
                    "project": self._project,
                    "experiment_name": self._name,
                    "experiment_key": run,
                    "mode": "get_or_create",
                    "online": self._online,
                })
        finally:
            tempfile.tempdir = former
        if not self._online:
            # Comet writes this file at the end only, but without it an archive cannot be uploaded.
            self._experiment._write_experiment_meta_file()

    @property
    def _experiment(self) -> Any:
        return self._monitor.comet_monitor.experiment

    def _hand_over(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)

    def _finish(self) -> None:
        self._experiment.end()

    def _sync_command(self) -> str:
        # Comet does not note what was uploaded.
        archives, uploaded = (shlex.quote(str(path)) for path in (self._archives, self._archives / "uploaded"))
        return f"comet upload {archives}/*.zip && mv {archives}/*.zip {uploaded}/"


# Comet is to take the metrics that it is given, and nothing else. A user's own variables come first.
COMET_SETTINGS = {
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_AUTO_LOG_CLI_ARGUMENTS": "false",
    "COMET_AUTO_LOG_CODE": "false",
    "COMET_AUTO_LOG_ENV_DETAILS": "false",
    "COMET_AUTO_LOG_GIT_METADATA": "false",
    "COMET_AUTO_LOG_GIT_PATCH": "false",
    "COMET_AUTO_LOG_OUTPUT_LOGGER": "",  # Comet 3.58 takes the text "false" for the name of a logger
    "COMET_DISABLE_ANNOUNCEMENT": "true",
    "COMET_DISPLAY_SUMMARY_LEVEL": "0",
    "COMET_ERROR_TRACKING_ENABLE": "false",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "3",  # of 10 s each
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_TIMEOUT_CLEANING": str(int(CLOSE_S)),
}
