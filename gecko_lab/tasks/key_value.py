"""Key-value retrieval from a file (the "lost in the middle" format): one record of many, at a chosen depth."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from ..components.registry import option
from ..errors import ConfigError, LabError
from .base import TASKS, Column, Progress, Task, nothing
from .continuations import WORTH, Pair, pair, score, worth
from .figures import Line, lines
from .files import field as value_of
from .files import read_rows
from .subject import Subject

FORM = "rows {ordered_kv_records: [[key, value], ...], key, value}"
PROMPT = 'A JSON object:\n\n{records}\n\nIn this object the value of the key "{key}" is'


@TASKS.register("key_value")
class KeyValue(Task):
    """The wanted record is moved to each depth in turn, the others keep their order. ``gain`` is how many nats a token
    cheaper the value is than after the same records without the wanted one: what reading the record was worth."""

    @dataclass
    class Config:
        name: str = option("key_value", "value of a key in a long JSON object, by the record's depth, from .jsonl")
        data: Optional[str] = option(None, FORM)  # noqa: UP045 (OmegaConf)
        limit: int = option(100, "rows, from the beginning; 0: all")
        records: int = option(0, "records of a row that are kept, the wanted one among them; 0: all")
        depths: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0], "where the record stands: 0 first, 1 last")
        prompt: str = option(PROMPT, "the text before the value, with {records} and {key}")

    columns = (Column("depth", "depth", ".2f"), Column("distance", "tokens back", ",.0f"), *WORTH)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if any(not 0 <= d <= 1 for d in config.depths) or not config.depths:
            raise ConfigError(f"depths={config.depths}: must be numbers from 0 (first) to 1 (last)")
        if config.records < 0 or config.records == 1:
            raise ConfigError(f"records={config.records}: must be at least 2, or 0 for all")
        if "{records}" not in config.prompt or "{key}" not in config.prompt:
            raise ConfigError("prompt: must contain {records} and {key}")

    def check(self, subject: Subject) -> None:
        self.rows = [_row(r) for r in read_rows(self.config.name, self.config.data, FORM, self.config.limit)]

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        depths, cases = self.config.depths, list[tuple[Pair, Pair, int]]()
        for depth in depths:
            cases += [self._case(subject, row, depth) for row in self.rows]
        found = score(subject, [p for case in cases for p in case[:2]], progress)
        shape = (len(depths), len(self.rows), 2)
        nats, tokens, right = (np.reshape(x, shape) for x in (found.nats, found.tokens, found.right))
        away = np.reshape([case[2] for case in cases], shape[:2])
        rows = [
            {"depth": depth, "distance": float(away[d].mean()), **worth(nats[d], tokens[d], right[d])}
            for d, depth in enumerate(depths)
        ]
        return {"rows": rows, "window": subject.window}

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        points = [[(r["distance"], r[key]) for r in results["rows"]] for key in ("exact", "token_accuracy")]
        group = [Line("exact", sorted(points[0])), Line("tokens right", sorted(points[1]), dashed=True)]
        marks = [] if results["window"] is None else [(float(results["window"]), "attention window")]
        axes = ("tokens between the record and the answer", "share of rows, of tokens")
        title = "Key-value retrieval by distance"
        return {"distance": lines(title, group, *axes, log_x=False, y_range=(0.0, 1.0), marks=marks)}

    def _case(self, subject: Subject, row: _Records, depth: float) -> tuple[Pair, Pair, int]:
        """The pair with the record, the pair without it, and the tokens from the record's end to the answer."""
        others = row.others[: self.config.records - 1] if self.config.records else row.others
        at = round(depth * len(others))
        records = [*others[:at], (row.key, row.value), *others[at:]]
        with_it, without = (
            pair(subject.tokenizer, self._prompt(chosen, row.key), f' "{row.value}"') for chosen in (records, others)
        )
        text = self._prompt(records, row.key)
        after = text[text.index(row.value) + len(row.value) :]
        return with_it, without, len(subject.tokenizer.encode(after))

    def _prompt(self, records: list[tuple[str, str]], key: str) -> str:
        body = json.dumps(dict(records), indent=0, ensure_ascii=False)
        return str(self.config.prompt).replace("{records}", body).replace("{key}", key)


@dataclass
class _Records:
    key: str
    value: str
    others: list[tuple[str, str]] = field(default_factory=list)


def _row(row: dict[str, Any]) -> _Records:
    records = value_of(row, "ordered_kv_records", list, FORM)
    key, value = value_of(row, "key", str, FORM), value_of(row, "value", str, FORM)
    if any(not isinstance(r, list) or len(r) != 2 or not all(isinstance(x, str) for x in r) for r in records):
        raise LabError(f"{row['where']}: a record is not [key, value] in text; wanted: {FORM}")
    others = [(k, v) for k, v in records if k != key]
    if len(others) == len(records) or not others:
        raise LabError(f"{row['where']}: its key is not among its records, or is the only one")
    return _Records(key, value, others)
