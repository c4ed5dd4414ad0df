"""What the sections of the schema are made of: a strict frozen dataclass, and kinds of numbers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, TypeVar, dataclass_transform

import pydantic

Positive = Annotated[float, pydantic.Field(gt=0)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
ProperFraction = Annotated[float, pydantic.Field(gt=0, lt=1)]
Seconds = Annotated[float, pydantic.Field(gt=0, le=1e6)]  # longer ones do not fit timers
LARGEST = 2**31 - 1  # of the integers: what JAX computes with where 64 bits are off
Count = Annotated[int, pydantic.Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, pydantic.Field(ge=0, le=LARGEST)]

Section = TypeVar("Section")


@dataclass_transform(frozen_default=True)
def config_section(cls: type[Section]) -> type[Section]:
    """A frozen dataclass that pydantic validates strictly: no unknown keys, no NaN, no guessing
    that "3" is a number."""
    strict = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    cls.__pydantic_config__ = strict  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)
