"""Building blocks of the settings: the base of every section, and the types that several share."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


def invalid(expected: str, remedy: str) -> PydanticCustomError:
    """Return the error for a field validator to raise; `loading` turns it into a Problem."""
    return PydanticCustomError(
        "explained", "expected {expected}", {"expected": expected, "remedy": remedy}
    )


def _printable(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise invalid("printable text that is not blank", "remove control characters and breaks")
    return text


def tuple_from_list(value: Any) -> Any:
    """Convert a YAML list to a tuple, so that a frozen section holds no mutable value."""
    return tuple(value) if isinstance(value, list) else value


# A bound against nonsense that no table needs to show.
UNBOUNDED = 2**31 - 1

Text = Annotated[str, Field(max_length=4096), AfterValidator(_printable)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
Size = Annotated[int, Field(ge=1, le=1024)]
Count = Annotated[int, Field(ge=1, le=UNBOUNDED)]
CountOrNever = Annotated[int, Field(ge=0, le=UNBOUNDED)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bf16", "fp32"]


class Section(BaseModel):
    """The base of all sections: frozen, strict, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
