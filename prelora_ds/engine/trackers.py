"""Where the metrics of a run go besides its logs: TensorBoard, CSV files, W&B and Comet.

All of them are written by DeepSpeed's own monitors. This module sees to it that they are one run
through all phases and jobs, and that the figures of a step appear once:

- TensorBoard and CSV files are cut back to the checkpoint that a job or a rollback continues from.
- W&B and Comet cannot be cut back, so a step that was handed over is not handed over again. A
  resumed run repeats its steps bitwise, so nothing but times would differ.
"""

from __future__ import annotations

import netrc
import os
import shlex
import shutil
import ssl
import sys
import tempfile
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from prelora_ds.files import replace_file

Event = tuple[str, float, int]  # name, value, number of samples

REACH_S = 3.0  # within which a service has to answer
CLOSE_S = 60.0  # within which a service has to take the last figures
FLUSH_S = 1.0  # after which figures for W&B are on the disk


class Tracker(ABC):
    """One place that metrics go to."""

    what: str  # as in "... cannot be written"

    @abstractmethod
    def open(self, after_samples: int) -> None:
        """Begin, or continue after ``after_samples``."""

    @abstractmethod
    def write(self, events: Sequence[Event]) -> None:
        """Write events of one step."""

    def end_step(self) -> None:  # noqa: B027
        """The step of the last events has no more events."""

    def rewind(self, after_samples: int) -> None:
        """Continue after ``after_samples`` in the same job."""
        self.close()
        self.open(after_samples)

    @abstractmethod
    def close(self) -> None:
        """Bring everything to its place."""


def _deepspeed_monitor(**config: Any) -> Any:
    """Return DeepSpeed's ``MonitorMaster`` with one monitor. It can be made only once there is a process group."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return MonitorMaster(get_monitor_config({key: {"enabled": True} | value for key, value in config.items()}))


class TensorBoard(Tracker):
    """Event files in ``folder``."""

    what = "TensorBoard's events"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _silence_the_writer()

    def open(self, after_samples: int) -> None:
        resumed = self._folder.is_dir()
        place = {"output_path": str(self._folder.parent), "job_name": self._folder.name}
        self._monitor = _deepspeed_monitor(tensorboard=place)
        if resumed:
            old = self._monitor.tb_monitor.summary_writer
            old.close()
            self._monitor.tb_monitor.summary_writer = type(old)(
                log_dir=old.log_dir, purge_step=after_samples + 1
            )

    def write(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)

    def close(self) -> None:
        self._monitor.tb_monitor.summary_writer.close()


def _silence_the_writer() -> None:
    """Keep TensorBoard's writer thread from printing a traceback.

    The next call to the writer raises the error again, and that call reports it.
    """
    former = threading.excepthook
    if getattr(former, "silences_tensorboard", False):
        return

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            former(args)

    hook.silences_tensorboard = True  # type: ignore[attr-defined]  # the mark that is checked above
    threading.excepthook = hook


class Csv(Tracker):
    """One file per metric in ``folder``, with the columns ``step`` (the number of samples) and the metric."""

    what = "the CSV files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, after_samples: int) -> None:
        place = {"output_path": str(self._folder.parent), "job_name": self._folder.name}
        self._monitor = _deepspeed_monitor(csv_monitor=place)
        # DeepSpeed 0.19 writes a header into every file that is not in this list.
        self._monitor.csv_monitor.filenames = [
            path.stem for path in sorted(self._folder.glob("*.csv")) if cut_csv(path, after_samples)
        ]

    def write(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)

    def close(self) -> None:
        pass  # DeepSpeed closes each file after each row


def cut_csv(path: Path, after_samples: int) -> bool:
    """Remove the rows after ``after_samples`` and an unfinished last line; return whether a header is left."""
    lines = path.read_bytes().splitlines(keepends=True)
    header, rows = lines[:1], lines[1:]
    kept = header + [row for row in rows if row.endswith(b"\n") and int(row.split(b",")[0]) <= after_samples]
    if not header or not header[0].endswith(b"\n"):
        path.unlink()
        return False
    if kept != lines:
        replace_file(path, b"".join(kept), durable=False)
    return True


class HandedOver:
    """The largest number of samples whose figures were handed over, in a file that survives a kill."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        text = os.read(self._descriptor, 64).strip()
        self.samples = int(text) if text.isdigit() else -1

    def advance(self, samples: int) -> bool:
        """Return whether the figures of ``samples`` were not handed over yet, and note that they now are.

        They are noted first: what a kill in between loses is missing, but nothing appears twice.
        """
        if samples <= self.samples:
            return False
        os.pwrite(self._descriptor, b"%020d\n" % samples, 0)
        self.samples = samples
        return True

    def close(self) -> None:
        os.close(self._descriptor)


class Service(Tracker):
    """A service that takes the steps of a run in order and cannot take any back.

    A step is handed over whole, once its row is there, so that a kill in the middle of a step does
    not leave a part of it behind.

    folder: where the run keeps its identifier, and what is not sent yet.
    name, project: the name of the run, and the project it belongs to.
    say: prints which mode was chosen, and how to send later what could not be sent.
    """

    key: ClassVar[str]  # its name in the recipe
    title: ClassVar[str]

    def __init__(self, folder: Path, name: str, project: str, say: Callable[[str], None]) -> None:
        self.what = f"the figures for {self.title}"
        self._folder = folder
        self._name = name
        self._project = project
        self._say = say
        self._held: list[Event] = []

    def open(self, after_samples: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._handed_over = HandedOver(self._folder / f"{self.key}.samples")
        self._tidy()
        self._online, why = self._choose_mode()
        self._say(f"{self.title}: {'online' if self._online else 'offline'}, because {why}")
        self._start(run_id(self._folder / "id"))

    def write(self, events: Sequence[Event]) -> None:
        if self._held and events and events[0][2] > self._held[-1][2]:
            self.end_step()  # not every step has a row
        self._held += events

    def end_step(self) -> None:
        events, self._held = self._held, []
        if events and self._handed_over.advance(events[-1][2]):
            self._hand_over(events)

    def rewind(self, after_samples: int) -> None:
        self._held = []  # the step that is repeated

    def close(self) -> None:
        # What is still held belongs to a step that did not end.
        self._held = []
        self._handed_over.close()
        within(CLOSE_S, self._finish)
        if not self._online:
            self._say(f"{self.title}: to send what was recorded offline, run: {self._sync_command()}")

    def _choose_mode(self) -> tuple[bool, str]:
        """Return whether to work online, and why."""
        chosen = self._users_choice()
        if chosen is not None:
            return chosen
        if self._unsent():
            return False, "figures of an earlier job were not sent yet, and steps have to arrive in order"
        if not self._has_key():
            return False, "no API key is known on this host"
        address = self._address()
        if not reachable(address):
            return False, f"{address} does not answer from this host"
        return True, f"{address} answers"

    @abstractmethod
    def _users_choice(self) -> tuple[bool, str] | None:
        """Return the mode that the service's own settings ask for, and which setting does."""

    @abstractmethod
    def _has_key(self) -> bool: ...

    @abstractmethod
    def _address(self) -> str: ...

    def _tidy(self) -> None:
        """Complete what a killed job has left behind."""

    @abstractmethod
    def _unsent(self) -> bool:
        """Return whether earlier jobs have recorded anything offline that was not sent since."""

    @abstractmethod
    def _start(self, run: str) -> None:
        """Begin or continue the run with the identifier ``run``."""

    @abstractmethod
    def _hand_over(self, events: Sequence[Event]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _sync_command(self) -> str: ...


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
            self._monitor = _deepspeed_monitor(wandb={"project": self._project})

    def _hand_over(self, events: Sequence[Event]) -> None:
        self._monitor.write_events(events)
        # W&B completes a step when the next one begins, which may be hours later.
        self._monitor.wandb_monitor.log({}, step=events[-1][2], commit=True)

    def _finish(self) -> None:
        import wandb

        wandb.finish()

    def _sync_command(self) -> str:
        return f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}"


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
                self._monitor = _deepspeed_monitor(comet={
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


def make_trackers(
    keys: Sequence[str], tensorboard: Path, folder: Path, name: str, project: str, say: Callable[[str], None]
) -> list[Tracker]:
    """Return the trackers that a recipe names.

    tensorboard: the folder of TensorBoard's events. folder: the folder of all other trackers.
    name, project: of the run, at a service. say: prints a line.
    """
    make: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(tensorboard),
        "csv": lambda: Csv(folder / "csv"),
        "wandb": lambda: Wandb(folder, name, project, say),
        "comet": lambda: Comet(folder, name, project, say),
    }
    return [make[key]() for key in keys]


def run_id(path: Path) -> str:
    """Return the identifier of a run at its trackers, 32 hexadecimal digits, which is made at the first call."""
    if not path.is_file():
        replace_file(path, f"{uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def reachable(address: str, timeout_s: float = REACH_S) -> bool:
    """Return whether a server answers at the URL ``address``, through a proxy if the environment names one."""

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=timeout_s).close()
        except HTTPError:
            pass  # it has answered
        except URLError as exc:
            if not isinstance(exc.reason, ssl.SSLError):
                raise

    try:
        within(timeout_s, ask)  # looking up a name may take longer than the timeout of urlopen
    except (OSError, ValueError, HTTPException):  # a TimeoutError is an OSError
        return False
    return True


def within(limit_s: float, act: Callable[[], object]) -> None:
    """Call ``act`` in a thread and raise its exception, or TimeoutError if it has not ended in time."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            act()
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"not finished after {limit_s:.0f} s")
    if failed:
        raise failed[0]


@contextmanager
def environment(fixed: dict[str, str], defaults: dict[str, str]) -> Iterator[None]:
    """Set the variables ``fixed``, and those of ``defaults`` that are not set; restore all of them at the end."""
    former = {name: os.environ.get(name) for name in (*fixed, *defaults)}
    os.environ.update({name: value for name, value in defaults.items() if not os.environ.get(name)} | fixed)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def without_prompts() -> Iterator[None]:
    """Keep libraries from asking for anything on the terminal, where nobody may be."""
    former = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = former
