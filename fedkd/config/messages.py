"""What is wrong with a config, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedkd.registry import nearest

# Keys of earlier versions, and what to write today.
_RENAMED = {"federation.dtype": "federation.codec (float16, float32 or another codec)"}


def one_line(root: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a pydantic error, in our words.

    A key that is missing may be one that is misspelt, so misspelt ones come first.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    kind, given = first["type"], first["input"]
    if kind == "extra_forbidden":
        if where in _RENAMED:
            return f"{where}: is called {_RENAMED[where]} now"
        allowed = list(model_at(root, first["loc"][:-1]).model_fields)
        return (
            f"{where}: unknown key{nearest(str(first['loc'][-1]), allowed)} "
            f"(allowed: {', '.join(allowed)})"
        )
    if kind == "literal_error":
        allowed_values = first["ctx"]["expected"]
        hint = nearest(
            str(given), [v.strip(" '") for v in allowed_values.replace(" or ", ", ").split(",")]
        )
        return f"{where}: expected {allowed_values}, got {given!r}{hint}"
    if kind == "missing":
        return f"{where}: required key is missing"
    if kind == "value_error":
        text = str(first["ctx"]["error"])
        return f"{where}: {text}" if where else text
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where or 'config'}: {message}, got {given!r}"


def model_at(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The model that describes the section at `location`; indices and free keys are passed over."""
    model: type[BaseModel] = root
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _section_in(model.model_fields[part].annotation) or model
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if found := _section_in(inner):
            return found
    return None
