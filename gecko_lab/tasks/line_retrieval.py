"""Line retrieval from a file (the LongEval format): the number in one line of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from ..components.registry import option
from ..errors import ConfigError, LabError
from .base import TASKS, Column, Progress, Task, nothing
from .continuations import WORTH, pair, score, worth
from .files import field, read_rows
from .subject import Subject

FORM = "rows {prompt, correct_line, expected_number}"


@TASKS.register("line_retrieval")
class LineRetrieval(Task):
    """exact: greedy decoding continues the prompt with the number. ``gain`` is how many nats a token cheaper the number
    is than after the prompt without the line that holds it."""

    @dataclass
    class Config:
        name: str = option("line_retrieval", "number in one of many lines, by its distance, from .jsonl")
        data: Optional[str] = option(None, FORM)  # noqa: UP045 (OmegaConf)
        limit: int = option(0, "rows, from the beginning; 0: all")
        ending: str = option("The <REGISTER_CONTENT> is <", "text put after the prompt, which the number follows")
        bins: int = option(4, "groups of rows by distance, of equal size")

    columns = (Column("nearest", "from", ",d"), Column("farthest", "to tokens back", ",d"), *WORTH)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.bins < 1:
            raise ConfigError(f"bins={config.bins}: must be at least 1")

    def check(self, subject: Subject) -> None:
        self.rows = []
        for row in read_rows(self.config.name, self.config.data, FORM, self.config.limit):
            prompt, line = field(row, "prompt", str, FORM), field(row, "correct_line", str, FORM)
            number = str(field(row, "expected_number", (int, str), FORM))
            if prompt.count(line) != 1 or number not in line:
                raise LabError(f"{row['where']}: its correct_line must stand once in its prompt and hold its number")
            self.rows.append((prompt, line, number))

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        pairs, away = [], []
        for prompt, line, number in self.rows:
            away.append(len(subject.tokenizer.encode(prompt.partition(line)[2] + self.config.ending)))
            texts = (prompt, prompt.replace(line, ""))
            pairs += [pair(subject.tokenizer, text + self.config.ending, number) for text in texts]
        found = score(subject, pairs, progress)
        nats, tokens, right = (np.reshape(x, (-1, 2)) for x in (found.nats, found.tokens, found.right))
        rows = []
        for chosen in np.array_split(np.argsort(away, kind="stable"), min(self.config.bins, len(away))):
            span = {"nearest": int(min(away[i] for i in chosen)), "farthest": int(max(away[i] for i in chosen))}
            rows.append({**span, **worth(nats[chosen], tokens[chosen], right[chosen])})
        return {"rows": rows, "window": subject.window, "exact": float((right[:, 0] == tokens[:, 0]).mean())}

    def summary(self, results: dict[str, Any]) -> dict[str, str]:
        window = results["window"]
        return {"window": "everything" if window is None else f"{window:,} tokens of attention"}
