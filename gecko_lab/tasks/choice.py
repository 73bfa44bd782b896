"""Multiple choice from a file: the answer that the model finds most likely after the question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from ..components.registry import option
from ..errors import LabError
from .base import TASKS, Column, Progress, Task, nothing
from .continuations import pair, score
from .files import field, read_rows, share
from .subject import Subject

FORM = (
    "rows {query, choices, gold}, {ctx, endings, label} or {context_options, continuation, gold} "
    "(gold and label count from 0)"
)


class Question(NamedTuple):
    """What is read before each choice, what is scored after it, the choices' own lengths, and the right one."""

    texts: list[str]
    continuations: list[str]
    sizes: list[int]
    gold: int


@TASKS.register("choice")
class Choice(Task):
    """accuracy: the choice of the highest log-probability; accuracy_norm: of the highest one a character of the choice
    (PIQA, ARC, BoolQ, HellaSwag report it). In a row with ``context_options`` the end is the same for all choices, the
    beginning differs, and the end is scored (WinoGrande)."""

    @dataclass
    class Config:
        name: str = option("choice", "multiple choice from .jsonl: PIQA, ARC, BoolQ, HellaSwag, WinoGrande, ...")
        data: Optional[str] = option(None, FORM)  # noqa: UP045 (OmegaConf)
        limit: int = option(0, "rows, from the beginning; 0: all")
        delimiter: str = option(" ", "text between a question and a choice")

    columns = (
        Column("data", "data"), Column("questions", "questions", ",d"), Column("accuracy", "accuracy", ".2%"),
        Column("accuracy_error", "+-", ".2%"), Column("accuracy_norm", "a character", ".2%"),
        Column("accuracy_norm_error", "+-", ".2%"), Column("chance", "chance", ".2%"),
    )  # fmt: skip

    def check(self, subject: Subject) -> None:
        rows = read_rows(self.config.name, self.config.data, FORM, self.config.limit)
        self.questions = [question(row, self.config.delimiter) for row in rows]

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        pairs = [pair(subject.tokenizer, *both) for q in self.questions for both in zip(q.texts, q.continuations)]
        nats = score(subject, pairs, progress).nats
        picked, per_size, start = [], [], 0
        for q in self.questions:
            own = nats[start : start + len(q.texts)]
            picked.append(int(np.argmax(-own)))
            per_size.append(int(np.argmax(-own / np.maximum(q.sizes, 1))))
            start += len(q.texts)
        gold = np.asarray([q.gold for q in self.questions])
        (plain, error), (norm, norm_error) = share(np.asarray(picked) == gold), share(np.asarray(per_size) == gold)
        row = {
            "data": Path(self.config.data).name, "questions": len(gold),
            "accuracy": plain, "accuracy_error": error, "accuracy_norm": norm, "accuracy_norm_error": norm_error,
            "chance": float(np.mean([1 / len(q.texts) for q in self.questions])),
        }  # fmt: skip
        return {"rows": [row], "picked": picked, "picked_norm": per_size, "gold": gold.tolist()}


def question(row: dict[str, Any], delimiter: str) -> Question:
    """A row in any of the three forms; LabError says what is wrong with it."""
    if "context_options" in row:
        choices, end = field(row, "context_options", list, FORM), field(row, "continuation", str, FORM)
        found = Question(choices, [delimiter + end] * len(choices), [len(end)] * len(choices), _gold(row, "gold"))
    else:
        ours = "query" in row
        text = field(row, "query" if ours else "ctx", str, FORM)
        choices = field(row, "choices" if ours else "endings", list, FORM)
        gold = _gold(row, "gold" if ours else "label")
        found = Question([text] * len(choices), [f"{delimiter}{c}" for c in choices], [len(c) for c in choices], gold)
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise LabError(f"{row['where']}: a question needs at least two choices, all of them text; wanted: {FORM}")
    if not 0 <= found.gold < len(choices):
        raise LabError(f"{row['where']}: the right answer is {found.gold}, the choices are 0..{len(choices) - 1}")
    return found


def _gold(row: dict[str, Any], name: str) -> int:
    value = field(row, name, (int, str), FORM)
    if not str(value).isdecimal():
        raise LabError(f"{row['where']}: {name}={value!r} is no number; wanted: {FORM}")
    return int(value)
