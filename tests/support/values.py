"""Random values for property tests, and their equality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hypothesis import strategies as st

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NORMS = st.dictionaries(
    st.text(), st.dictionaries(st.integers(), st.floats(), max_size=3), max_size=3
)


def same(a: Any, b: Any) -> bool:
    """Return whether two values have equal types, bits (NaN included) and order of keys throughout.

    All mappings count as one type.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return repr(a) == repr(b) and (math.isnan(a) or a == b)
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
