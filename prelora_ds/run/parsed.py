"""Files of a run that anybody may have edited: their values are checked while they are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prelora_ds.errors import ConfigError


def _printable(text: str) -> str:
    text.encode()  # raises a ValueError for a surrogate, which JSON can hold and no terminal can print
    return text


Text = Annotated[str, AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Real = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
# Logs of earlier versions have NaN and infinities where today's have null.
Measured = Annotated[
    Real | None,
    BeforeValidator(
        lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    ),
]


class Record(BaseModel):
    """A JSON object of which only some keys are read."""

    model_config = ConfigDict(strict=True, extra="ignore", validate_by_name=True)


T = TypeVar("T", bound=Record)


def parsed(kind: type[T], row: Any, path: Path, where: str) -> T:
    """Return ``row`` as a ``kind``. Raises ConfigError, which names ``path`` and ``where`` in it."""
    try:
        return kind.model_validate(row)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "the row"
        raise ConfigError(
            "log",
            str(path),
            f"{where} cannot be understood: {key}: {first['msg']}",
            "restore that file, or move it away; checkpoints and the model do not depend on it",
        ) from exc
