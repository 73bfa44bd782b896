"""metrics.jsonl: one JSON object a line, {"step": S, name: number, ...}, for scripts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..run import write_atomic


class MetricsFile:
    """Appends records; a resumed run first drops the ones that come after its checkpoint, as it will repeat them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: dict[str, Any]) -> None:
        """NaN and infinities, which JSON does not have, are written as null."""
        with self.path.open("a") as out:
            out.write(json.dumps({"step": step, **_plain(values)}, allow_nan=False) + "\n")

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after ``step`` and any damaged line; returns what stays."""
        if not self.path.exists():
            return []
        records = (_parse(line) for line in self.path.read_text().splitlines())
        found = [record for record in records if record is not None and record["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in found))
        return found


def last_validation(records: list[dict[str, Any]]) -> int:
    """Step of the last validation in these records; -1: none."""
    return max((record["step"] for record in records if "val/loss" in record), default=-1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
