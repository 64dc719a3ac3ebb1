"""The reference of all config keys (docs/config.md), made from the models of the config.

Only `make docs` and a test import this module.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prelora_ds.config.changes import RENAMED, may_differ
from prelora_ds.config.deepspeed_section import (
    KNOWN_KEYS,
    NOT_SUPPORTED,
    OFFLOAD_KEYS,
    OWNED_BY_RECIPE,
    REFUSED_ZERO_KEYS,
    ZERO_KEYS,
)
from prelora_ds.config.fields import InWords
from prelora_ds.config.tree import Config
from prelora_ds.core.duration import Duration

INTRODUCTION = """\
# Configuration reference

This page lists every key of a recipe by its dotted path. `make docs` writes it from the models in
`prelora_ds/config`; edit the descriptions there.

A recipe is a YAML file. An override on the command line, such as `train.log_every=10`, sets one
key. `phases.*` stands for any entry of the list `phases`; an override gives the name of the phase
instead, as in `phases.warmup.until='5 epochs'`. An unknown key is an error, and so is a value of
another type.

A **duration** is a text: a number of steps or epochs, or a share of the run (`500 steps`, `10
epochs`, `5 %`). A **time** is a text or a number of seconds (`6 h`, `90 min`, `30 s`, `06:00:00`).

A resumed run must have the config that it began with, except for the keys that **may change on
resume**: they set where and how fast the run executes, and what is watched and kept. A fork is a
new run that begins from the checkpoint of another run (`--resume PATH` with another
`run.output_dir`). It may also change the keys that **may change in a fork**; of `phases` these are
the phases after the one that the checkpoint is in, and the end of that one.
"""
WIDTH = 100


@dataclass(frozen=True)
class Key:
    """One key of the config.

    path: its dotted path, with ``*`` for any entry of a list.
    field: its annotation and default.
    description: Markdown, on one line.
    """

    path: str
    field: FieldInfo
    description: str

    @property
    def sections(self) -> list[tuple[str, type[BaseModel]]]:
        """The sections that the value may be, by their paths."""
        return list(_models(self.field.annotation, self.path))

    @property
    def is_section(self) -> bool:
        """Whether the value is always one section, whose keys say all about its type and default."""
        return isinstance(self.field.annotation, type) and bool(self.sections)


def reference() -> str:
    """The text of docs/config.md."""
    parts = [INTRODUCTION, _former_names()]
    for key in keys_of_model(Config):
        parts.append(f"\n## {key.path}\n\n{_wrapped(key.description)}\n\n")
        if not key.is_section:
            parts.append(_entry(key, described=False))
        for path, model in key.sections:
            if path != key.path:
                parts.append(_heading([path], model))
            parts.extend(_section([path], model))
        if key.path == "deepspeed":
            parts.append(_deepspeed_keys())
    return "".join(parts)


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key of the config, each followed by the keys below it."""
    for key in keys_of_model(model, prefix):
        yield key
        for path, section in key.sections:
            yield from all_keys(section, f"{path}.")


def keys_of_model(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of ``model`` itself, whose paths begin with ``prefix``."""
    descriptions = _descriptions(model)
    for name, field in model.model_fields.items():
        yield Key(prefix + (field.alias or name), field, descriptions.get(name, ""))


def _section(paths: Sequence[str], model: type[BaseModel],
             above: frozenset[type[BaseModel]] = frozenset()) -> Iterator[str]:
    """The entries of ``model``, which lies at each of ``paths``, and then those of the sections in it.

    A section that may also lie deeper, within another one of them, is listed once with all of its paths; ``above`` are
    those that have been listed already.
    """
    below: dict[type[BaseModel], list[str]] = {}
    for keys in zip(*(keys_of_model(model, f"{path}.") for path in paths), strict=True):
        yield _entry(*keys)
        for key in keys:
            for path, section in key.sections:
                below.setdefault(section, []).append(path)
    for section, sections in list(below.items()):
        for inner_path, inner in (each for path in sections for key in keys_of_model(section, f"{path}.")
                                  for each in key.sections):
            if inner in below:
                below[inner].append(inner_path)
    for section, sections in below.items():
        if section not in above:
            yield _heading(sections, section)
            yield from _section(sections, section, above | below.keys())


def _heading(paths: Sequence[str], model: type[BaseModel]) -> str:
    """The heading of a section; if a key must have one value there, the heading names it."""
    summary = (inspect.getdoc(model) or "").partition("\n")[0].replace("``", "`")
    named = [f"`{name}: {value}`" for name, field in model.model_fields.items()
             if get_origin(field.annotation) is Literal and field.is_required()
             for value in get_args(field.annotation) if len(get_args(field.annotation)) == 1]
    head = " with ".join([_listed(paths), *named])
    return f"\n### {head}\n\n{_wrapped(summary)}\n\n"


def _entry(*keys: Key, described: bool = True) -> str:
    """One item of a list, about ``keys`` of the same model at different paths."""
    key = keys[0]
    names = ", ".join(f"**`{each.path}`**" for each in keys)
    facts = [] if key.is_section else [
        in_words(key.field.annotation, key.field.metadata), _default(key), _on_resume(key.path)]
    head = "; ".join(filter(None, facts))
    lines = [_wrapped(f"- {names}" + (f" ({head})" if head else ""), indent="  ")]
    if described:
        lines.append(_wrapped(f"  {key.description}", indent="  "))
    return "\\\n".join(lines) + "\n"


def _default(key: Key) -> str:
    if key.field.is_required():
        return "required"
    value = key.field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"default `{_written(value)}`"


def _on_resume(path: str) -> str:
    if may_differ(path):
        return "may change on resume"
    return "may change in a fork" if may_differ(path, new_run=True) else ""


def _written(value: Any) -> str:
    """A value as it is written in a recipe."""
    return str(value) if isinstance(value, str | Duration) else json.dumps(value)


def in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The type ``annotation`` with the constraints in ``metadata``, in words."""
    *first, last = dict.fromkeys(_alternatives(annotation, metadata))
    return f"{', '.join(first)} or {last}" if first else last


def _alternatives(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    """The types and values that ``annotation`` allows, each in words."""
    constraints = [part for entry in metadata for part in _constraints(entry)]
    names = [entry.text for entry in constraints if isinstance(entry, InWords)]
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if names:
        yield names[-1]
    elif origin is Annotated:
        yield from _alternatives(arguments[0], [*arguments[1:], *constraints])
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from _alternatives(part, ())
    elif origin is Literal:
        yield from (f"`{_written(value)}`" for value in arguments)
    elif origin is tuple and arguments[-1] is Ellipsis:
        yield f"a list (each entry is {in_words(arguments[0])})"
    elif origin is tuple:
        yield f"a list of {len(arguments)} (each entry is {in_words(arguments[0])})"
    elif origin is dict and arguments[1] is Any:
        yield "a mapping"
    elif origin is dict:
        yield f"a mapping (each value is {in_words(arguments[1])})"
    elif issubclass(annotation, BaseModel):
        yield "a mapping of the keys below"
    else:
        plain = {bool: "`true` or `false`", int: "an integer", float: "a number", str: "a text", NoneType: "`null`"}
        yield " and ".join([*_bounded(plain[annotation], constraints)])


def _bounded(name: str, constraints: Sequence[Any]) -> Iterator[str]:
    """``name`` with its first bound, and then each further one."""
    bounds = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    texts = [f"{sign} {_number(getattr(entry, part))}" for entry in constraints if isinstance(entry, Gt | Ge | Lt | Le)
             for part, sign in bounds.items() if hasattr(entry, part)]
    yield " ".join([name, *texts[:1]])
    yield from texts[1:]


def _number(value: Any) -> str:
    return "2^64" if value == 2**64 else f"{value:g}"


def _constraints(entry: Any) -> Sequence[Any]:
    """The constraints in one entry of an Annotated."""
    return entry.metadata if isinstance(entry, FieldInfo) else [entry]


def _models(annotation: Any, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a value of ``annotation`` at ``path`` may be, by their paths."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield path, annotation
    elif origin is Annotated:
        yield from _models(arguments[0], path)
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from _models(part, path)
    elif origin is tuple:
        yield from _models(arguments[0], f"{path}.*")


def _descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the string below it in the source of ``model`` or a parent of it, on one line.

    pydantic's option use_attribute_docstrings does the same, but whenever the config is imported.
    """
    texts: dict[str, str] = {}
    for parent in reversed(model.__mro__[:model.__mro__.index(BaseModel)]):
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) \
                    and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _former_names() -> str:
    text = ", ".join(f"`{old}` is now `{new}`" for old, new in RENAMED.items())
    return f"\n{_wrapped(f'Names of earlier versions are still read: {text}.')}\n"


def _deepspeed_keys() -> str:
    """What a DeepSpeed config may contain, here, in a phase or in a file."""
    refused = {key: f"{why}; only `{json.dumps(off)}` is accepted" for key, (off, why) in REFUSED_ZERO_KEYS.items()}
    paragraphs = (
        f'The accepted keys are {_listed(KNOWN_KEYS)}. A key with the value "auto" is '
        "ignored, but the ZeRO stage and `offload_optimizer` must have values.",
        f"The accepted keys of `zero_optimization` are {_listed(ZERO_KEYS)}.",
        f"The accepted keys of `zero_optimization.offload_optimizer` are {_listed(OFFLOAD_KEYS)}.",
        "These keys of `zero_optimization` are refused:",
        _table(refused, "reason"),
        "These keys are refused because the recipe sets them:",
        _table(OWNED_BY_RECIPE, "set by"),
        "These keys are not supported:",
        _table(NOT_SUPPORTED, "reason"),
    )
    return "\n" + "\n\n".join(part if part.startswith("|") else _wrapped(part) for part in paragraphs) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(rows: Mapping[str, str], title: str) -> str:
    return "\n".join([f"| key | {title} |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in rows.items())])
