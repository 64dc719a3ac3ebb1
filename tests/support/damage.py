"""Logs and other files of JSON, damaged at random."""

from __future__ import annotations

import re

from hypothesis import strategies as st

WORDS = [
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"0",
    b'""',
    b"{}",
    b"[]",
    b"true",
    b"\n",
    b"\0",
    b"9" * 25,
    b'"\\ud800"',
    b"9" * 5000,
    b"1e308",
    b"[" * 3000,
]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with a value or a few bytes replaced, or as anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=40))
    data, values = content, [m.span(1) for m in re.finditer(rb": ([^,{}\[\]]+)", content)]
    for _ in range(draw(st.integers(1, 2))):
        start = draw(st.integers(0, len(data)))
        start, stop = draw(st.sampled_from(values) | st.just((start, start + 3)))
        data = data[:start] + draw(st.sampled_from(WORDS) | st.binary(max_size=3)) + data[stop:]
    return data
