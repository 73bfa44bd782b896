"""LAMBADA: the last word of a passage, which only the whole passage tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..components.registry import option
from .base import TASKS, Column, Progress, Task, nothing
from .continuations import pair, score
from .files import field, read_rows, share
from .subject import Subject

FORM = "rows {context, continuation}"


@TASKS.register("lambada")
class Lambada(Task):
    """accuracy: greedy decoding writes the word; perplexity of the word, and nats a word."""

    @dataclass
    class Config:
        name: str = option("lambada", "last word of a passage, from .jsonl")
        data: Optional[str] = option(None, FORM)  # noqa: UP045 (OmegaConf)
        limit: int = option(0, "rows, from the beginning; 0: all")
        delimiter: str = option(" ", "text between context and continuation")

    columns = (
        Column("data", "data"), Column("passages", "passages", ",d"), Column("accuracy", "accuracy", ".2%"),
        Column("accuracy_error", "+-", ".2%"), Column("perplexity", "perplexity", ",.2f"),
        Column("nats", "nats a word", ".3f"),
    )  # fmt: skip

    def check(self, subject: Subject) -> None:
        rows = read_rows(self.config.name, self.config.data, FORM, self.config.limit)
        self.texts = [(field(r, "context", str, FORM), field(r, "continuation", str, FORM)) for r in rows]

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        pairs = [pair(subject.tokenizer, text, self.config.delimiter + word) for text, word in self.texts]
        found = score(subject, pairs, progress)
        accuracy, error = share(found.exact)
        nats = float(found.nats.mean())
        row = {
            "data": Path(self.config.data).name, "passages": len(pairs), "accuracy": accuracy, "accuracy_error": error,
            "perplexity": math.exp(nats) if nats < 700 else math.inf, "nats": nats,
        }  # fmt: skip
        return {"rows": [row], "right": found.exact.astype(int).tolist()}
