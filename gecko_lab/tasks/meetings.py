"""Questions about meetings from a file (the QMSum format): each meeting is read once, every question asks its state."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

from ..components.registry import option
from ..errors import ConfigError, LabError
from .base import TASKS, Column, Progress, Task, nothing
from .files import field, read_rows
from .subject import Subject

FORM = (
    "rows {meeting_transcripts: [{speaker, content}, ...], general_query_list and specific_query_list: "
    "[{query, answer}, ...]}"
)
KEYS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@TASKS.register("meetings")
class Meetings(Task):
    """ROUGE F-measures and the F1 of words (by torchmetrics) of greedy answers, and nats a token of the true answers,
    beside those of the same questions asked without a meeting."""

    @dataclass
    class Config:
        name: str = option("meetings", "summaries and answers about meetings, from .jsonl (QMSum)")
        data: Optional[str] = option(None, FORM)  # noqa: UP045 (OmegaConf)
        limit: int = option(0, "meetings, from the beginning; 0: all")
        length: int = option(128, "tokens of an answer at most; it ends earlier at a line's end")
        prompt: str = option("\n\nQuestion: {query}\nAnswer:", "the text between meeting and answer, with {query}")

    columns = (
        Column("asked", "asked"), Column("questions", "questions", ",d"),
        *(Column(key, title, ".2f") for key, title in KEYS.items()), Column("f1", "word F1", ".2f"),
        Column("nats", "nats a token", ".3f"),
    )  # fmt: skip

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.length < 1:
            raise ConfigError(f"length={config.length}: must be at least 1")
        if "{query}" not in config.prompt:
            raise ConfigError("prompt: must contain {query}")

    def check(self, subject: Subject) -> None:
        self.meetings = [
            (_transcript(r), _questions(r))
            for r in read_rows(self.config.name, self.config.data, FORM, self.config.limit)
        ]

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        total, done = sum(len(q) for _, q in self.meetings), 0
        answers: dict[str, list[dict[str, Any]]] = {"after the meeting": [], "without it": []}
        for transcript, questions in self.meetings:
            for asked, text in zip(answers, (transcript, "")):
                tokens = subject.tokenizer.encode(text).astype(np.int64)
                start = torch.from_numpy(np.concatenate([[subject.tokenizer.bos_id], tokens]))[None]
                _, state = subject.read(start)
                answers[asked] += [self._answer(subject, state, query, true) for query, true in questions]
            done += len(questions)
            progress(done, total)
        rows = [{"asked": asked, "questions": total, **_measures(found)} for asked, found in answers.items()]
        return {"rows": rows, "answers": answers}

    def _answer(self, subject: Subject, state: Any, query: str, true: str) -> dict[str, Any]:
        text = str(self.config.prompt).replace("{query}", query)
        prompt = torch.from_numpy(subject.tokenizer.encode(text).astype(np.int64))[None]
        logits, after = subject.read(prompt, state)
        scored = subject.score(logits, after, [subject.tokenizer.encode(" " + true).astype(np.int64)])
        made = subject.tokenizer.decode(subject.follow(logits, after, self.config.length)[0])
        line = made.strip().partition("\n")[0].strip()
        return {"query": query, "answer": true, "made": line, "nats": float(scored.nats[0] / scored.tokens[0])}


def _measures(answers: list[dict[str, Any]]) -> dict[str, float]:
    from torchmetrics.functional.text import rouge_score, squad

    made, true = [a["made"] for a in answers], [a["answer"] for a in answers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty answer scores 0, which is what is meant
        rouge = rouge_score(made, true, rouge_keys=tuple(KEYS))
        words = squad(
            [{"prediction_text": text, "id": str(i)} for i, text in enumerate(made)],
            [{"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(true)],
        )
    found = {key: 100 * float(rouge[f"{key}_fmeasure"]) for key in KEYS}
    return found | {"f1": float(words["f1"]), "nats": float(np.mean([a["nats"] for a in answers]))}


def _transcript(row: dict[str, Any]) -> str:
    said = field(row, "meeting_transcripts", list, FORM)
    if not said or any(not isinstance(s, dict) or not {"speaker", "content"} <= s.keys() for s in said):
        raise LabError(f"{row['where']}: meeting_transcripts needs entries {{speaker, content}}")
    return "\n".join(f"{s['speaker']}: {s['content']}" for s in said)


def _questions(row: dict[str, Any]) -> list[tuple[str, str]]:
    found = [q for name in ("general_query_list", "specific_query_list") for q in row.get(name) or []]
    if not found or any(not isinstance(q, dict) or not q.get("query") or not q.get("answer") for q in found):
        raise LabError(f"{row['where']}: no questions, or one without query and answer; wanted: {FORM}")
    return [(str(q["query"]), str(q["answer"])) for q in found]
