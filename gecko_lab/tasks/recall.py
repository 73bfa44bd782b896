"""A run of a synthetic task (``data=mqar``, ``induction``, ...) asked at lengths that it was not trained at.

The answers are told apart by how far back what they follow from was read, beside the attention window: what a model
knows beyond its window it knows by its state. Published curves of induction heads stand in the figure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..components.registry import option
from ..data.errors import DataError
from ..data.synthetic import SyntheticConfig
from ..errors import LabError
from ..telemetry.curves import lower_edge
from .base import TASKS, Column, Progress, Sheet, Task, nothing
from .figures import Line, lines
from .subject import Subject

EVALUATION = 4  # the family of random streams, beside those of training and validation (data.synthetic.task)
PIECE = 4096
# Gu and Dao, "Mamba" (arXiv 2312.00752), table 11: two layers trained at length 256, by length
PUBLISHED_LENGTHS = [2**n for n in (8, 9, 10, 11, 12, 14)]
PUBLISHED = {
    "attention, RoPE": [1.0, 0.836, 0.313, 0.184, 0.086, 0.055],
    "attention, xPos": [1.0, 0.996, 0.676, 0.254, 0.070, 0.078],
    "H3": [1.0, 0.809, 0.395, 0.238, 0.148, 0.059],
    "Mamba": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
}


@dataclass
class Tally:
    """Of the answers in a bin of distances: how many, how many right, nats."""

    answers: dict[int, int] = field(default_factory=dict)
    right: dict[int, int] = field(default_factory=dict)
    nats: float = 0.0
    rows: int = 0
    exact: int = 0

    def add(self, distances: np.ndarray, hits: np.ndarray, rows: np.ndarray, count: int) -> None:
        """distances, hits, rows (N,) of the answers in a batch of ``count`` rows."""
        bins = np.frexp(distances)[1]  # 0, 1, 2-3, 4-7, ... as in telemetry.curves
        for i in np.unique(bins).tolist():
            self.answers[i] = self.answers.get(i, 0) + int((bins == i).sum())
            self.right[i] = self.right.get(i, 0) + int(hits[bins == i].sum())
        self.rows += count
        self.exact += int((np.bincount(rows[~hits], minlength=count) == 0).sum())


@TASKS.register("recall")
class Recall(Task):
    """Accuracy by length of the row and by distance."""

    @dataclass
    class Config:
        name: str = option("recall", "synthetic tasks at other lengths than trained: accuracy by length and distance")
        lengths: list[int] = option([], "tokens in a row; []: 1, 2, 4 and 8 times what the run was trained at")
        examples: int = option(256, "rows of each length")
        batch_size: int = option(32, "rows side by side")
        anywhere: bool = option(True, "mqar: ask anywhere in the row (data.power=1), so that far answers are asked for")
        seed: int = option(0, "seed of the examples, which are none of the run's")

    columns = (
        Column("length", "length", ","),
        Column("times_trained", "x trained", ".3g"),
        Column("accuracy", "accuracy", ".2%"),
        Column("exact", "whole rows", ".2%"),
        Column("loss", "nats an answer", ".4f"),
        Column("answers", "answers", ","),
    )
    DISTANCE = (
        Column("length", "length", ","),
        Column("span", "distance"),
        Column("windows", "x window", ".3g"),
        Column("accuracy", "accuracy", ".2%"),
        Column("answers", "answers", ","),
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for name, value in (("examples", config.examples), ("batch_size", config.batch_size)):
            if value < 1:
                raise LabError(f"{name}={value}: must be at least 1")
        if config.seed < 0:
            raise LabError(f"seed={config.seed}: must not be negative")
        if any(length < 1 for length in config.lengths):
            raise LabError(f"lengths={list(config.lengths)}: every length must be at least 1")

    def check(self, subject: Subject) -> None:
        training = None if subject.artifact is None else subject.artifact.training
        if training is None or not isinstance(training.data, SyntheticConfig):
            on = "unknown data" if training is None else f"data={training.data.name}"
            raise LabError(f"task=recall: needs a run of data=mqar, induction, selective_copy or listops, not of {on}")
        self.data = training.data
        self.lengths = list(self.config.lengths) or [self.data.seq_len * n for n in (1, 2, 4, 8)]
        for length in self.lengths:
            try:
                self.asked(length).check()
            except DataError as error:
                raise LabError(f"lengths={self.lengths}: {error}") from None

    def asked(self, length: int) -> SyntheticConfig:
        """The task at another length."""
        changes: dict[str, Any] = {"seq_len": length}
        if self.config.anywhere and self.data.name == "mqar":
            changes["power"] = 1.0
        return dataclasses.replace(self.data, **changes)

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        rows, by_distance = [], []
        total, done = self.config.examples * sum(self.lengths), 0
        for length in self.lengths:
            tally, task = Tally(), self.asked(length)
            for first in range(0, self.config.examples, self.config.batch_size):
                count = min(self.config.batch_size, self.config.examples - first)
                self._batch(subject, task, count, first, tally)
                done += count * length
                progress(done, total)
            answers = sum(tally.answers.values())
            rows.append(
                {
                    "length": length,
                    "times_trained": length / self.data.seq_len,
                    "accuracy": sum(tally.right.values()) / answers,
                    "exact": tally.exact / tally.rows,
                    "loss": tally.nats / answers,
                    "answers": answers,
                }
            )
            by_distance += [
                {
                    "length": length,
                    "from": lower_edge(i),
                    "to": lower_edge(i + 1) - 1,
                    "windows": None if subject.window is None else lower_edge(i) / subject.window,
                    "accuracy": tally.right[i] / n,
                    "answers": n,
                }
                for i, n in sorted(tally.answers.items())
            ]
        return {
            "data": dataclasses.asdict(self.data),
            "window": subject.window,
            "rows": rows,
            "by_distance": by_distance,
        }

    def _batch(self, subject: Subject, task: SyntheticConfig, count: int, first: int, tally: Tally) -> None:
        """Read some examples in pieces and note the answers."""
        rng = np.random.default_rng([EVALUATION, self.config.seed, task.seq_len, first])
        drawn, state = task.draw(rng, count), None
        tokens = torch.from_numpy(drawn.tokens)
        hits = np.zeros(drawn.tokens.shape, dtype=bool)
        for begin in range(0, task.seq_len, PIECE):
            span = np.s_[:, begin : begin + PIECE]
            features, state = subject.features(tokens[span], state, None)
            mask = drawn.scored[span]
            if mask.any():
                kept = features[torch.from_numpy(mask).to(subject.device)][None]
                goals = torch.from_numpy(drawn.targets[span][mask])[None]
                tally.nats += float(subject.losses(kept, goals).double().sum())
                hits[span][mask] = (subject.logits(kept)[0].argmax(-1).cpu() == goals[0]).numpy()
        where, scored = np.nonzero(drawn.scored)[0], drawn.scored
        tally.add(drawn.distances[scored], hits[scored], where, count)

    def tables(self, results: dict[str, Any]) -> list[Sheet]:
        found = [Sheet(f"Accuracy by length, trained at {results['data']['seq_len']:,}", self.columns, results["rows"])]
        rows = [
            r | {"span": f"{r['from']:,} - {r['to']:,}" if r["to"] > r["from"] else f"{r['from']:,}"}
            for r in results["by_distance"]
            if r["from"]
        ]
        if rows:
            window = results["window"]
            seen = "everything" if window is None else f"at most {window:,} tokens a layer"
            found.append(Sheet(f"Accuracy by distance (attention sees {seen})", self.DISTANCE, rows))
        return found

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        trained, window = results["data"]["seq_len"], results["window"]
        group = [Line("this model", [(r["length"], r["accuracy"]) for r in results["rows"]])]
        if results["data"]["name"] == "induction":
            group += [
                Line(f"{name} (published)", list(zip(PUBLISHED_LENGTHS, values)), dashed=True)
                for name, values in PUBLISHED.items()
            ]
        found = {
            "length": lines(
                f"{results['data']['name']}: accuracy by length", group, "tokens in a row", "accuracy",
                y_range=(0.0, 1.0), marks=[(trained, "trained")],
            )
        }  # fmt: skip
        lengths = [r["length"] for r in results["rows"]]
        curves = [
            Line(
                f"length {length:,}",
                [(r["from"], r["accuracy"]) for r in results["by_distance"] if r["length"] == length and r["from"]],
            )
            for length in lengths
        ]
        if any(c.points for c in curves):
            found["distance"] = lines(
                f"{results['data']['name']}: accuracy by distance", curves, "tokens since the answer was read",
                "accuracy", y_range=(0.0, 1.0), marks=[(window, "window")] if window else [],
            )  # fmt: skip
        return found
