"""A service that takes a run's figures over the network, or records them for later."""

from __future__ import annotations

import os
import ssl
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from uuid import uuid4

from prelora_ds.engine.trackers.base import Event, Tracker
from prelora_ds.files import replace_file

REACH_S = 3.0  # within which a service has to answer
CLOSE_S = 60.0  # within which a service has to take the last figures


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
