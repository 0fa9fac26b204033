"""A VM's specification: the TOML file as the host wants it. For `vm create` only; the host judges what it says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from vmferry.model.errors import NotFound, WrongInput

_PATH_KEYS = ("kernel", "initrd", "image")


def read_spec(path: Path) -> dict[str, Any]:
    """The parsed file, paths in it made absolute from the file's directory. Raises WrongInput with the file's name."""
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound("no-spec", f"There is no file {path}.", "Correct -f.") from error
    except OSError as error:
        raise WrongInput(
            "no-spec", f"{path} cannot be read: {error.strerror}.", "Correct -f, or its rights."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongInput("bad-spec", f"{path} is not TOML: {error}.", "Correct the line named.") from error
    try:
        json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WrongInput("bad-spec", f"{path} holds a date or an infinite number.", "A VM needs neither.") from error
    directory = path.absolute().parent
    _make_absolute(spec.get("boot"), directory)
    disks = spec.get("disk")
    for disk in disks if isinstance(disks, list) else ():
        _make_absolute(disk, directory)
    return spec


def _make_absolute(table: object, directory: Path) -> None:
    if not isinstance(table, dict):
        return
    for key in _PATH_KEYS:
        if isinstance(table.get(key), str) and table[key]:
            table[key] = str(directory / table[key])
