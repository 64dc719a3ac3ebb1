"""Reading labels and class names from shards and lists that others wrote."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prelora_ds.errors import ConfigError

# Without class names the classes are the numbers up to the largest label, and each of them has a
# row in the head.
MOST_CLASSES = 1_000_000
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_NAMES = "name a text file with one class name per line, in the order of the labels 0, 1, ..."
_SHOWN = 60  # characters of an unexpected value in a message


class SampleError(ValueError):
    """A sample of a shard cannot be used; ``remedy`` is what the user can do about it."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(problem)


def read_classes(path: Path, key: str = "--classes") -> tuple[str, ...]:
    """Read the class names of a text file with one name per line.

    A byte-order mark and blank lines are ignored. Raises ConfigError for a file that cannot be
    read, is not UTF-8 or contains no name, and for a name that occurs twice, since its number
    would be ambiguous.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # converts every kind of line end to \n
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text ({error.reason} at byte {error.start})"
        raise ConfigError(key, str(path), problem, "save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be read ({error.strerror})", _NAMES) from error
    lines: dict[str, int] = {}
    forms: dict[str, str] = {}  # composed form -> name
    for number, line in enumerate(text.split("\n"), 1):
        name = line.strip()
        if "\0" in name:
            raise ConfigError(key, str(path), f"line {number} contains a null byte", _NAMES)
        if name in lines:
            raise ConfigError(
                key,
                str(path),
                f"lists {name!r} twice, in lines {lines[name]} and {number}",
                "give each class a unique name",
            )
        composed = unicodedata.normalize("NFC", name)
        if name and (other := forms.setdefault(composed, name)) != name:
            raise ConfigError(
                key,
                str(path),
                f"lists the same text in two Unicode forms, {other!a} and {name!a}, in lines "
                f"{lines[other]} and {number}",
                "give each class a unique name, in one form",
            )
        if name:
            lines[name] = number
    if not lines:
        raise ConfigError(key, str(path), "contains no class name", _NAMES)
    return tuple(lines)


class LabelReader:
    """Reads the label of a sample from its ``.cls`` or its ``.json``.

    label_key: None reads the number in ``.cls`` or, if there is no ``.cls``, the value of "label"
        in ``.json``. Otherwise the label is the value of this key in ``.json``, and ``.cls`` is
        ignored.
    classes: the class names. With them a string in JSON is always a name, and a number is the
        index of a class, counted from 0. If names are numbers other than their own indices, a
        number in JSON is ambiguous and is refused.
    """

    def __init__(self, label_key: str | None, classes: Sequence[str] | None) -> None:
        self.key = label_key or "label"
        self._only_json = label_key is not None
        self._classes = classes
        self._numbers: dict[str, list[int]] = {}
        for number, name in enumerate(classes or ()):
            self._numbers.setdefault(name, []).append(number)
        self._all_numbers = all(map(_NUMBER.fullmatch, self._numbers))
        # Names that are their own indices carry no information.
        self._named = any(name != str(index) for index, name in enumerate(classes or ()))

    def member(self, extensions: Sequence[str]) -> str:
        """Return which of a sample's extensions holds the label. Raises SampleError."""
        wanted = ("json",) if self._only_json else ("cls", "json")
        for extension in wanted:
            if extension in extensions:
                return extension
        if "cls" in extensions:
            raise SampleError(
                f"has a .cls and no .json, and the label is expected under {self.key!r} in a .json",
                "omit --label-key to read the labels from .cls",
            )
        raise SampleError(
            f"has the members {sorted(extensions)}, and none with its label (.cls or .json)",
            "write the shards again, with a label next to each image",
        )

    def read(self, extension: str, data: bytes) -> int:
        """Return the label in ``data``, the member with this extension. Raises SampleError."""
        label = _number(data) if extension == "cls" else self._from_json(data)
        if label < 0 or (self._classes is not None and label >= len(self._classes)):
            of = "of a class"
            if self._classes is not None:
                of = f"of one of the {len(self._classes)} classes"
            raise SampleError(
                f"has the label {label}, which is not the number {of}",
                "labels count from 0: write other labels, or give all class names with --classes",
            )
        if label >= MOST_CLASSES:
            raise SampleError(
                f"has the label {label}, and the classes would be the numbers from 0 to {label}",
                f"write labels below {MOST_CLASSES:,} that count from 0",
            )
        return label

    def _from_json(self, data: bytes) -> int:
        try:
            content = json.loads(data, object_pairs_hook=self._unique_key)
        except (ValueError, RecursionError) as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(
                f"has a .json that cannot be read ({error})", "write the shards again"
            ) from error
        if not isinstance(content, dict) or self.key not in content:
            has = _shown(content)
            if isinstance(content, dict):
                has = f"the keys {_shown(sorted(content))}"
            raise SampleError(
                f"has a .json without the key {self.key!r}; it contains {has}",
                "name the key of the label with --label-key",
            )
        label = content[self.key]
        if isinstance(label, int) and not isinstance(label, bool):
            self._refuse_ambiguous(label)
            return label
        if not isinstance(label, str):
            raise SampleError(
                f"has {_shown(label)} under {self.key!r} in its .json, which is neither a number "
                "nor a name",
                "name the key of the label with --label-key",
            )
        return self._from_name(label)

    def _refuse_ambiguous(self, label: int) -> None:
        """Raise SampleError for a number that may be the index of a class or its name."""
        named = self._numbers.get(str(label), [label])
        if self._named and (self._all_numbers or named != [label]):
            raise SampleError(
                f"has the number {label} under {self.key!r} in its .json, and class names are "
                "numbers too: it may be the index of a class or its name",
                'write a name as a string ("1"), or an index as a number into a .cls; or give '
                "names that are not numbers",
            )

    def _from_name(self, name: str) -> int:
        numbers = self._numbers.get(name, [])
        if len(numbers) > 1:
            raise SampleError(
                f"has the label {name!r}, which is the name of the classes {numbers[0]} and "
                f"{numbers[1]}",
                "give each class a unique name with --classes",
            )
        if numbers:
            return numbers[0]
        if not self._named and _NUMBER.fullmatch(name.strip()):
            return int(name)
        problem = "no class names are given"
        if self._classes is not None:
            problem = f"it is not the name of any of the {len(self._classes)} classes"
        raise SampleError(
            f"has the label {_shown(name)} in its .json, and {problem}",
            "give the names of all classes with --classes FILE or --like SHARDS",
        )

    def _unique_key(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(key == self.key for key, _ in pairs) > 1:
            raise SampleError(
                f"has the key {self.key!r} twice in its .json", "write the shards again"
            )
        return dict(pairs)


def _number(data: bytes) -> int:
    """Return the number in a ``.cls``. Raises SampleError."""
    text = data.removeprefix(b"\xef\xbb\xbf").strip().decode("ascii", "replace")
    if not _NUMBER.fullmatch(text):
        raise SampleError(
            f"has {_shown(data)} in its .cls, which is not a number",
            "write the number of the class into it, or name a key of the .json with --label-key",
        )
    return int(text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
