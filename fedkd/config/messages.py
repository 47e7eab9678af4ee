"""What is wrong with a config, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedkd.io.text import nearest

# Keys of earlier versions, and what to write today.
_RENAMED = {
    "federation.dtype": "federation.codec (float16, float32 or another codec)",
    "guidance": "assistant_mode (takd for next, dgkd for dense)",
}

# Keys of features that are gone: measured, they gave nothing.
_GONE = (
    "distillation.memory",
    "distillation.curriculum",
    "distillation.ema",
    "student.pretraining",
)


def one_line(root: type[BaseModel], error: ValidationError) -> str:
    """The first problem of a pydantic error, in our words.

    A key that is missing may be one that is misspelt, so misspelt ones come first.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    kind, given = first["type"], first["input"]
    if kind == "extra_forbidden":
        for old, new in _RENAMED.items():
            if f".{where}".endswith(f".{old}"):  # a study nests the experiment
                return f"{where}: is called {new} now"
        if f".{where}".endswith(tuple(f".{old}" for old in _GONE)):
            return f"{where}: is gone, since it made no student better; leave it out"
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
    if kind == "model_type" and where:
        return f"{where}: {_not_a_section(model_at(root, first['loc']), where, given)}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where or 'config'}: {message}, got {given!r}"


# Of a section that is given as one word, the key that the word is likely meant for.
_MEANT = ("model", "models", "dataset", "name", "losses", "use")


def _not_a_section(model: type[BaseModel], where: str, given: Any) -> str:
    keys = list(model.model_fields)
    if model.model_config.get("extra") == "allow":  # a component
        return f"expected a name, or a mapping with a name and options, got {given!r}"
    if given is None:
        return f"is empty; leave the key out, or give some of: {', '.join(keys)}"
    text = f"expected a mapping (keys: {', '.join(keys)}), got {given!r}"
    meant = [key for key in _MEANT if key in keys]
    if isinstance(given, str) and meant:
        text += f"; did you mean {where}.{meant[0]}={given}?"
    return text


def component_at(root: type[BaseModel], location: Sequence[int | str]) -> bool:
    """Whether a component is at `location`, which may be in a list, and not a plain value."""
    *parents, last = [part for part in location if not str(part).isdecimal()]
    field = model_at(root, parents).model_fields.get(str(last))
    found = None if field is None else _section_in(field.annotation)
    return found is not None and "name" in found.model_fields


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
