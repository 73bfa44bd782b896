"""Rows of the files that evaluations read: .jsonl, plain or compressed, checked before a model is touched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..data.reader import find_files, is_jsonl, read_raw
from ..errors import ConfigError, LabError


def read_rows(task: str, path: str | None, form: str, limit: int = 0) -> list[dict[str, Any]]:
    """The first ``limit`` rows (0: all) of a .jsonl file (.xz, .gz, .zst), a folder or a glob of such files.

    ``form`` says in messages what a row holds. LabError: no path, no such file, another format, no rows.
    """
    if path is None:
        raise ConfigError(f"task={task} needs data=FILE: {form}, one JSON object a line; plain, .xz, .gz or .zst")
    if limit < 0:
        raise ConfigError(f"limit={limit}: must not be negative (0: all rows)")
    rows: list[dict[str, Any]] = []
    for file in find_files(path):
        if not is_jsonl(Path(file.path)):
            raise LabError(f"{file.path}: task={task} reads .jsonl files ({form}), plain, .xz, .gz or .zst")
        for raw in read_raw(file):
            try:
                row = json.loads(raw.data)
            except ValueError as error:
                raise LabError(f"{raw.where}: not a JSON row ({error}); task={task} wants {form}") from None
            if not isinstance(row, dict):
                raise LabError(f"{raw.where}: the row is no object; task={task} wants {form}")
            rows.append(row | {"where": raw.where})
            if len(rows) == limit:
                return rows
    if not rows:
        raise LabError(f"{path}: no rows; task={task} wants {form}")
    return rows


def field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], form: str) -> Any:
    """One value of a row. LabError names the file, the line and what a row must hold."""
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        has = ", ".join(k for k in row if k != "where")
        raise LabError(f"{row['where']}: field {name!r} is missing or of another type (it has {has}); wanted: {form}")
    return value


def share(flags: np.ndarray) -> tuple[float, float]:
    """The mean of 0 and 1, and its standard error as of a sample (nan for one)."""
    n, mean = len(flags), float(np.mean(flags))
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
