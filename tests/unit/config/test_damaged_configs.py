"""Damaged recipes, overrides and DeepSpeed JSONs are either read correctly or end in one ConfigError."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import merged

from prelora_ds.config.documents import UnreadableError, check_plain
from prelora_ds.config.load import dump_yaml, load_config, validate
from prelora_ds.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
SCRAPS = st.sampled_from(
    [
        "true",
        "0100",
        "1:30",
        "~",
        "null",
        "",
        " ",
        "\t",
        "\n",
        ":",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!int ",
        "#",
        "'",
        '"',
        "${",
        "${run.name}",
        "...",
        "---",
        "<<: ",
        "1e999",
        ".nan",
        "x",
        "\ufeff",
        "\0",
        "\u2028",
        "\\ud800",
        "%",
        "|",
        ">-",
        "?",
        "é",
        "9" * 30,
        ",",
    ]
)


@st.composite
def mutations(draw: st.DrawFn, text: str) -> str:
    """``text`` with a few pieces removed, repeated or inserted."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 12)))
        text = text[:start] + draw(SCRAPS | st.just(text[start:stop] * 2)) + text[stop:]
    return text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def survives(
    folder: Path, recipe: bytes, overrides: Sequence[str] = (), json_text: bytes | None = None
) -> None:
    """A config that is read is also read back from its dump; otherwise there is one short ConfigError."""
    (folder / "r.yaml").write_bytes(recipe)
    if json_text is not None:
        (folder / "ds.json").write_bytes(json_text)
    try:
        config = load_config(
            folder / "r.yaml", overrides, None if json_text is None else folder / "ds.json"
        )
    except ConfigError as error:
        assert len(str(error)) < 20_000 and error.remedy
    else:
        (folder / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(folder / "again.yaml") == config


DEBUG = (ROOT / "launch/recipes/vit_tiny_debug.yaml").read_text()
ZERO2 = (ROOT / "ds_configs/zero2.json").read_text()


@settings(max_examples=300)
@given(text=mutations(DEBUG) | st.builds(yaml.safe_dump, TREES) | st.builds(json.dumps, TREES))
def test_no_recipe_ends_in_another_error(scratch: Path, text: str) -> None:
    survives(scratch, text.encode("utf-8", "surrogatepass"))


@given(content=st.binary(max_size=40))
def test_no_bytes_end_in_another_error(scratch: Path, content: bytes) -> None:
    survives(scratch, content)
    survives(scratch, DEBUG.encode(), [], content)


KEYS = st.sampled_from(
    [
        "run.name",
        "run.output_dir",
        "run.seed",
        "optimizer.lr",
        "optimizer.betas",
        "data.flip",
        "train",
        "train.duration",
        "train.log_every",
        "convergence",
        "convergence.every",
        "observe",
        "observe.every",
        "lora.families",
        "model.factory_args",
        "model.families",
        "deepspeed",
        "deepspeed.zero_optimization",
        "phases.lora.zero_stage",
        "phases.lora.deepspeed",
        "checkpoint.walltime",
        "checkpoint.every",
        "checkpoint.async",
        "data.workers",
        "launch.interface",
        "guard.hang_limit",
        "model.num_channels",
    ]
)


@settings(max_examples=300)
@given(
    overrides=st.lists(
        st.builds(
            "{}={}".format,
            KEYS | TEXTS,
            st.builds("".join, st.lists(SCRAPS, max_size=3)) | TEXTS | st.builds(json.dumps, TREES),
        )
        | TEXTS,
        min_size=1,
        max_size=3,
    )
)
def test_no_override_ends_in_another_error(scratch: Path, overrides: list[str]) -> None:
    survives(scratch, DEBUG.encode(), overrides)


@settings(max_examples=200)
@given(
    text=mutations(ZERO2)
    | st.builds(
        json.dumps,
        st.dictionaries(
            st.sampled_from(
                ["zero_optimization", "bf16", "comms_logger", "prescale_gradients", "x"]
            ),
            TREES,
            max_size=3,
        ),
    )
)
def test_no_deepspeed_json_ends_in_another_error(scratch: Path, text: str) -> None:
    survives(scratch, DEBUG.encode(), [], text.encode("utf-8", "surrogatepass"))


@given(
    name=NAMES,
    values=st.dictionaries(
        TEXTS,
        st.none()
        | st.booleans()
        | st.integers()
        | TEXTS
        | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
)
def test_whatever_a_config_holds_is_dumped_and_read_back(
    scratch: Path, name: str, values: dict[str, Any]
) -> None:
    """Texts, some of which look like numbers, like another key (${...}) or like syntax."""
    config = validate(merged({"run": {"name": name}, "model": {"factory_args": values}}), "test")
    try:
        check_plain(values)
    except UnreadableError:
        return
    path = scratch / "dump.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "text",
    [
        "a\x85b",
        "a\u2028",
        "\u2029~",
        "${x}",
        "\\${x}",
        "\\\\${x}",
        "a${",
        "$\\{x}",
        "${oc.env:HOME}\\",
        "\\",
    ],
)
def test_a_text_that_looks_like_something_else_is_dumped_as_a_text(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "dump.yaml"
    path.write_text(dump_yaml(validate(merged({"run": {"name": text}}), "test")))
    assert load_config(path).run.name == text
