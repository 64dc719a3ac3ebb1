"""Dataclasses as JSON and back: every class round-trips, and what does not fit is refused with its path."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.values import FINITE, NORMS, same

from prelora_ds.core.codec import CodecError, fields_from_json, fields_to_json, from_json, to_json
from prelora_ds.core.divergence import DivergenceWatch
from prelora_ds.core.stragglers import Straggler
from prelora_ds.core.switch_tests.prelora import Observation, Verdict, WindowStats


class Stage(StrEnum):
    FULL = "full"
    LORA = "lora"


@dataclass(frozen=True)
class Spec:
    """Stands for an adapter of a plan."""

    kind: str
    rank: int | None
    scaling: float
    seed: int = 0
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    stage: Stage
    adapters: Mapping[str, Spec]
    trainable: frozenset[str]
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[tuple[int, str], ...] = ()
    merged: bool = False


@dataclass(frozen=True)
class State:
    plan: Plan
    windows: tuple[WindowStats, ...] = ()
    open: tuple[Observation, ...] = ()
    last: Spec | None = None
    steps: Mapping[Stage, list[int]] = field(default_factory=dict)


OBSERVATIONS = st.builds(Observation, norms=NORMS)
WINDOWS = st.builds(WindowStats, norms=NORMS)
OPTIONS = st.dictionaries(st.text(), st.integers() | FINITE | st.text() | st.booleans(), max_size=3)
SPECS = st.builds(Spec, options=OPTIONS)
PLANS = st.builds(Plan, adapters=st.dictionaries(st.text(), SPECS, max_size=2))
STATES = st.builds(State, plan=PLANS, windows=st.lists(WINDOWS, max_size=2).map(tuple),
                   open=st.lists(OBSERVATIONS, max_size=2).map(tuple), last=st.none() | SPECS)


def through_text(value: object) -> Any:
    """``value`` as another process reads it; the text is strict JSON."""
    return json.loads(json.dumps(to_json(value), allow_nan=False))


@given(OBSERVATIONS | WINDOWS | STATES | st.builds(DivergenceWatch) | st.builds(Straggler) | st.builds(Verdict))
def test_every_value_comes_back_bit_for_bit(value: Any) -> None:
    assert same(from_json(type(value), through_text(value)), value)
    assert same(from_json(type(value), to_json(value)), value)


def test_the_form_of_each_type() -> None:
    plan = Plan(Stage.LORA, {"a": Spec("lora", None, math.inf)}, frozenset("ca"), {"b": math.nan}, ((1, "x"),))
    assert to_json(plan) == {
        "stage": "lora",
        "adapters": {"a": {"kind": "lora", "rank": None, "scaling": "Infinity", "seed": 0, "options": {}}},
        "trainable": ["a", "c"], "lr_scale": {"b": None}, "spans": [[1, "x"]], "merged": False}
    assert to_json(Observation(1, 2, -math.inf, {"q": {0: 0.5}})) == {
        "step": 1, "samples": 2, "loss": "-Infinity", "norms": {"q": {"0": 0.5}}}


def test_a_missing_field_takes_its_default_and_one_without_is_named() -> None:
    data = to_json(State(Plan(Stage.FULL, {"a": Spec("lora", 8, 1.0)}, frozenset())))
    for key in ("windows", "open", "last", "steps"):
        del data[key]
    del data["plan"]["adapters"]["a"]["seed"]
    assert from_json(State, data) == State(Plan(Stage.FULL, {"a": Spec("lora", 8, 1.0)}, frozenset()))
    del data["plan"]["adapters"]["a"]["rank"]
    with pytest.raises(CodecError, match=r"^plan\.adapters\.a\.rank is missing$"):
        from_json(State, data)


def test_a_key_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^avoided_for is not a field of DivergenceWatch; did a later version"):
        from_json(DivergenceWatch, {"avoided_for": "ever"})


def test_words_that_an_older_version_wrote_for_numbers_are_read() -> None:
    data = json.loads('{"step": 1, "samples": 2, "loss": NaN, "norms": {"q": {"0": -Infinity, "1": 3}}}')
    again = from_json(Observation, data)
    assert math.isnan(again.loss) and again.norms == {"q": {0: -math.inf, 1: 3.0}}
    assert type(again.norms["q"][1]) is float


WHOLE = to_json(State(Plan(Stage.FULL, {"a": Spec("lora", 8, 1.0, 0, {"alpha": 1})}, frozenset("a"), {}, ((1, "x"),)),
                      (WindowStats(0, 1, 2.0, {"q": {0: 1.0}}),), steps={Stage.FULL: [1, 2]}))


@pytest.mark.parametrize(("path", "value", "problem"), [
    ("plan", None, "is None, and not the fields of a Plan"),
    ("plan.stage", "fine", "is 'fine', and not one of full, lora"),
    ("plan.stage", ["full"], "and not one of full, lora"),
    ("plan.adapters", [], "is [], and not a mapping"),
    ("plan.adapters.a.kind", 1, "is 1, and not a text"),
    ("plan.adapters.a.rank", 8.0, "is 8.0, and not int or NoneType"),
    ("plan.adapters.a.rank", True, "is True, and not int or NoneType"),
    ("plan.adapters.a.scaling", "1", "is '1', and not a number"),
    ("plan.adapters.a.scaling", True, "is True, and not a number"),
    ("plan.adapters.a.scaling", 10**400, "and not a number"),
    ("plan.adapters.a.seed", None, "is None, and not an integer"),
    ("plan.adapters.a.options.alpha", [1], "is [1], and not int or float or str or bool"),
    ("plan.trainable", "a", "is 'a', and not a list"),
    ("plan.trainable", {"a": 1}, "and not a list"),
    ("plan.trainable.0", 1, "is 1, and not a text"),
    ("plan.spans.0", [1], "is [1], and not a list of 2"),
    ("plan.spans.0.1", 2, "is 2, and not a text"),
    ("plan.merged", 0, "is 0, and not true or false"),
    ("windows.0.norms.q", {"00": 1.0}, "is '00', and not an integer as its key"),
    ("windows.0.norms.q", {"x": 1.0}, "is 'x', and not an integer as its key"),
    ("windows.0.norms.q.0", "much", "is 'much', and not a number"),
    ("last", "lora", "is 'lora', and not the fields of a Spec"),
    ("steps", {"fine": []}, "is 'fine', and not one of full, lora"),
])
def test_what_does_not_fit_is_refused_with_its_path(path: str, value: Any, problem: str) -> None:
    data = json.loads(json.dumps(WHOLE))
    *above, last = path.split(".")
    place = data
    for key in above:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(CodecError) as caught:
        from_json(State, data)
    assert caught.value.path in (path, f"{path}.fine")
    assert problem in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_json_is_read_or_refused_as_a_codec_error(data: Any) -> None:
    for cls in (State, Observation, DivergenceWatch, Straggler):
        with pytest.raises(CodecError):
            from_json(cls, data if data != {} else [])


# ---- classes with a form of their own

@dataclass(frozen=True)
class Celsius:
    """A class that was written in Fahrenheit before it had a version."""

    degrees: float

    def to_json(self) -> Any:
        return {"version": 2, **fields_to_json(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Celsius:
        values = dict(data)
        if values.pop("version", 1) == 1:
            return cls((values["degrees"] - 32) / 1.8)
        return fields_from_json(cls, values)


@dataclass(frozen=True)
class Room:
    air: Celsius
    walls: tuple[Celsius, ...] = ()


def test_a_class_may_have_a_form_of_its_own_wherever_it_stands() -> None:
    room = Room(Celsius(20.0), (Celsius(math.inf),))
    assert through_text(room) == {"air": {"version": 2, "degrees": 20.0},
                                  "walls": [{"version": 2, "degrees": "Infinity"}]}
    assert from_json(Room, through_text(room)) == room
    assert from_json(Room, {"air": {"degrees": 50}}) == Room(Celsius(10.0))
    assert from_json(Celsius, to_json(room.air)) == room.air


@pytest.mark.parametrize(("wall", "message"), [
    ({"version": 2, "degrees": "warm"}, "walls.0.degrees is 'warm', and not a number"),
    ({"version": 1}, "walls.0 cannot be parsed (KeyError('degrees'))"),
    (3, "walls.0 cannot be parsed (TypeError"),
])
def test_what_such_a_class_refuses_has_the_whole_path(wall: Any, message: str) -> None:
    with pytest.raises(CodecError) as caught:
        from_json(Room, {"air": {"degrees": 50}, "walls": [wall]})
    assert str(caught.value).startswith(message)


@dataclass(frozen=True)
class Checked:
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share of {self.share} is not between 0 and 1")


@dataclass(frozen=True)
class Holder:
    checked: Checked


def test_what_a_class_checks_when_it_is_made_has_its_path() -> None:
    with pytest.raises(CodecError, match=r"^checked a share of 2.0 is not between 0 and 1$"):
        from_json(Holder, {"checked": {"share": 2}})


# ---- programming errors

@dataclass(frozen=True)
class Unclear:
    either: Spec | Plan


@dataclass(frozen=True)
class Unknown:
    any: object


@pytest.mark.parametrize(("cls", "data", "problem"), [
    (Unclear, {"either": {}}, r"Spec.* and .*Plan.* at 'either' cannot be distinguished in JSON"),
    (Unknown, {"any": 1}, "at 'any' cannot be written as JSON"),
])
def test_an_annotation_that_json_cannot_tell_is_a_type_error(cls: type, data: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        from_json(cls, data)


@pytest.mark.parametrize("value", [object(), b"bytes", 1j, {True: 1}, {1.5: 1}])
def test_a_value_without_a_form_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError):
        to_json(value)
