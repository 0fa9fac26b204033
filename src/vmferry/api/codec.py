"""The model's frozen dataclasses as JSON and back, and errors as problem documents (RFC 9457).

For everything that crosses the wire or goes into the journal. It knows types, never meanings: rules between values
belong to the model. Importing it is cheap; Pydantic is loaded by the first `decode`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from http import HTTPStatus
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vmferry.model import errors
from vmferry.model.errors import Failed, VmferryError, WrongInput

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

PROBLEM_MEDIA_TYPE = "application/problem+json"
_SHOWN_FAULTS = 20


def encode(obj: object) -> Any:
    """`obj` as what `json.dumps` takes: dataclasses become objects, tuples lists, enums their value, bytes base64.

    Raises TypeError on anything else (a programming mistake): sets, NaN and infinity have no JSON form.
    """
    if isinstance(obj, Enum):
        return obj.value
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return _finite(obj)
    if is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: encode(getattr(obj, field.name)) for field in fields(obj)}
    if isinstance(obj, Mapping):
        return {_key(key): encode(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [encode(item) for item in obj]
    if isinstance(obj, bytes):
        return base64.urlsafe_b64encode(obj).decode()
    if isinstance(obj, PurePath):
        return str(obj)
    raise TypeError(f"{type(obj).__name__} has no JSON form")


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise TypeError(f"{value} has no JSON form")
    return value


def _key(key: object) -> str:
    plain = key.value if isinstance(key, Enum) else key
    if not isinstance(plain, str):
        raise TypeError(f"{key!r} cannot be a key in JSON")
    return plain


def decode(kind: type[T], data: object) -> T:
    """A `kind` (dataclass, tuple of them, ...) from parsed JSON. Nothing is converted: "5" is not a number.

    Unknown keys are errors; members of a union are told apart by their fields. Raises WrongInput `bad-document` which
    names the path of every key that is wrong.
    """
    from pydantic import ValidationError

    try:
        return cast(T, _adapter(cast(Hashable, kind)).validate_json(json.dumps([data], allow_nan=False))[0])
    except ValidationError as error:
        raise WrongInput(
            "bad-document",
            f"Not a valid {getattr(kind, '__name__', str(kind))}: {'; '.join(_faults(error, data))}.",
            "Both sides may be of different versions of vmferry; otherwise correct the keys named.",
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongInput("bad-document", f"Not a JSON document: {error}.", "Send JSON (RFC 8259).") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[tuple[Any]]:
    """The tuple around it is what lets plain dataclasses inherit `config`: alone they cannot be given one."""
    from pydantic import ConfigDict, TypeAdapter

    config = ConfigDict(extra="forbid", strict=True, val_json_bytes="base64", allow_inf_nan=False)
    return TypeAdapter(tuple[kind], config=config)


def _faults(error: ValidationError, data: object) -> list[str]:
    """One line per fault. Of a union's members only the one that fits best speaks."""
    by_branch: dict[tuple[Any, ...], dict[tuple[Any, ...], list[str]]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path, branch = _split(item["loc"][1:], data, item["type"])
        union = tuple(part for part, _ in branch)
        shown = f"{_dotted(path) or 'document'}: {_reason(item['type'], item['msg'])}"
        by_branch.setdefault(union[:1], {}).setdefault(branch[:1], []).append(shown)
    lines: list[str] = []
    for branches in by_branch.values():
        lines += sorted(branches.values(), key=len)[0]
    return lines[:_SHOWN_FAULTS] + (["..."] if len(lines) > _SHOWN_FAULTS else [])


def _split(loc: tuple[int | str, ...], data: object, kind: str) -> tuple[list[int | str], tuple[Any, ...]]:
    """The path in the document, and the union members (path so far, member's name) which Pydantic mixes into it."""
    path: list[int | str] = []
    members: list[tuple[tuple[int | str, ...], str]] = []
    here: Any = data
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if _holds(here, part):
            here = here[part]
        elif not (last and kind in ("missing", "missing_argument")):
            members.append((tuple(path), str(part)))
            continue
        path.append(part)
    return path, tuple(members)


def _holds(container: object, part: int | str) -> bool:
    if isinstance(container, list):
        return isinstance(part, int) and part < len(container)
    return isinstance(container, dict) and part in container


def _dotted(path: list[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in path)
    return text.removeprefix(".")


def _reason(kind: str, message: str) -> str:
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return "unknown key"
    if kind in ("missing", "missing_argument"):
        return "missing"
    return message[:1].lower() + message[1:]


_KINDS: dict[str, type[VmferryError]] = {
    kind.__name__: kind
    for kind in (
        errors.VmferryError,
        errors.WrongInput,
        errors.NotFound,
        errors.Conflict,
        errors.Refused,
        errors.Failed,
        errors.OutcomeUnknown,
        errors.Unreachable,
    )
}
_BY_STATUS: dict[int, type[VmferryError]] = {
    400: errors.WrongInput,
    401: errors.Refused,
    403: errors.Refused,
    404: errors.NotFound,
    409: errors.Conflict,
    422: errors.Refused,
    502: errors.Unreachable,
    504: errors.OutcomeUnknown,
}


def problem(error: VmferryError) -> dict[str, Any]:
    """The problem document of an error: RFC 9457's members, and `code`, `fix`, `kind` (the class to raise again)."""
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _KINDS)
    return {
        "type": "about:blank",
        "title": HTTPStatus(error.http_status).phrase,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "fix": error.fix,
        "kind": kind,
    }


def error_from_problem(document: object) -> VmferryError:
    """The error that a problem document tells of, to be raised. Whatever it holds, an error comes back.

    A document without a known `kind` (another program answered) is judged by its status; what is no problem document
    at all becomes Failed `bad-answer`.
    """
    if not isinstance(document, dict):
        return Failed("bad-answer", "The other side answered with an error that is not a problem document.")
    status = document.get("status")
    by_status = _BY_STATUS.get(status, Failed) if isinstance(status, int) else Failed
    kind = _KINDS.get(_text(document, "kind"), by_status)
    detail = _text(document, "detail") or _text(document, "title") or "The other side gave no reason."
    return kind(_text(document, "code") or "bad-answer", detail, _text(document, "fix"))


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) else ""
