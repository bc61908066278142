"""Options from a file: TOML with the options' names, or the ``run.json`` of a run."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

NOT_IN_A_FILE = ("help", "config", "output", "resume", "overwrite", "accept_changes")
"""What a run is told anew each time."""

OF_AN_ADAPTER = ("rank", "alpha", "target_modules", "layers", "variant", "allow_high_rank")
"""What a run with ``--adapter`` takes from it, and one with ``--full`` has not."""

_RENAMED = {"from_adapter": "adapter", "layers_to_transform": "layers"}
"""Settings of ``run.json`` that are called otherwise than their options."""


def with_config(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with those of ``--config`` wherever the command line has none.

    ``arguments`` has its ``parser``, and as ``argv`` what it was parsed from.

    Errors: ValueError for a file that cannot be read, or an option that there is not.
    """
    if arguments.config is None:
        return arguments
    parser: argparse.ArgumentParser = arguments.parser
    known = {a.dest: a for a in parser._actions if a.dest not in NOT_IN_A_FILE}
    values = _values(Path(arguments.config))
    for name, value in values.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{arguments.config}: found {name}, expected an option of this{hint}")
        _check(arguments.config, known[name], value)
    before = {name: parser.get_default(name) for name in values}
    try:
        # A text is read as if it stood on the command line.
        parser.set_defaults(**{name: _as_given(v) for name, v in values.items()})
        merged = parser.parse_args(arguments.argv)
    finally:
        parser.set_defaults(**before)
    merged.parser, merged.argv = parser, arguments.argv
    return merged


def _values(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            from minilora.io.loading import read_run

            return _of_run(read_run(path))
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; expected TOML, or a run.json") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def _of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run was made with."""
    values = {_RENAMED.get(k, k): v for k, v in run["settings"].items() if k != "dtype"}
    values |= {part: run[part]["name"] for part in ("model", "data") if "name" in run[part]}
    values["date"] = run["data"].get("date")
    if kept_as := values.pop("prefix", None):
        values["prefix_cache"] = "memory"  # whose sums have the same order as a folder's
        values["prefix_dtype"] = "float32" if kept_as == "float64" else kept_as
    if values.get("full") or values.get("adapter"):
        values = {name: value for name, value in values.items() if name not in OF_AN_ADAPTER}
    return {name: value for name, value in values.items() if value is not None}


def _check(path: str, action: argparse.Action, value: Any) -> None:
    """Errors: ValueError for a value of another type than the option has."""
    if action.nargs == 0:
        fits, expected = isinstance(value, bool), "true or false"
    elif action.type in (int, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and (action.type is float or isinstance(value, int))
        expected = "a whole number" if action.type is int else "a number"
    else:
        fits, expected = isinstance(value, str | list), "a text"
    if not fits:
        raise ValueError(f"{path}: {action.dest}: found {value!r}, expected {expected}")


def _as_given(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value
