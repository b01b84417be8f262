"""Options from outside, `--conf` pairs and clients' JSON, as pydantic models; a sentence for a wrong one.

Viewers send more than they mean: a choice as the list they were offered, the chosen one first, and numbers as
text. Both are taken here, for every model alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "enum": "{expected}",
    "literal_error": "{expected}",
}
_SHOWN = 80  # letters of a wrong value in the sentence


class OptionError(ValueError):
    """An option that cannot be used; the message names it and says what it may be."""


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise ValueError("a whole number is expected")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number, which may be text; neither true nor 4.0."""
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_truth)]
"""A finite number, which may be text."""


def between(low: float, high: float) -> AfterValidator:
    """Bounds of a number, both included."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"{low} to {high} is expected")
        return value

    return AfterValidator(check)


class Options(BaseModel):
    """What a model of options has in common: it is frozen, unknown options are refused, null is no answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        plain = {k: v[0] if isinstance(v, list) and v else v for k, v in given.items()}
        return {k: v for k, v in plain.items() if v is not None and v != ""}


Read = TypeVar("Read", bound=Options)


def read(model: type[Read], given: Mapping[str, Any]) -> Read:
    """The options of a request or a command, checked.

    Raises:
        OptionError: for the first one that is unknown or does not fit.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise OptionError(_sentence(model, error.errors()[0])) from None


def _sentence(model: type[Options], error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"][:1])
    if error["type"] == "extra_forbidden":
        return f"unknown option {name}; known are: {', '.join(model.model_fields)}"
    context = error.get("ctx", {})
    expected = _EXPECTED.get(error["type"], "").format(**context)
    if not expected:  # a validator's own words: "… is expected"
        expected = str(context.get("error", error["msg"])).removesuffix(" is expected")
    value = repr(error["input"])
    return f"{name} must be {expected}, not {value if len(value) <= _SHOWN else value[:_SHOWN] + '…'}"
