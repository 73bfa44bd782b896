"""What the retrieval tasks share: a grid of lengths and depths, the reading, the scores, the pictures.

A haystack is read once and all of its questions are asked from the state that reading left, the other ones not heard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from ..components import state as states
from ..components.registry import option
from ..errors import LabError
from .base import Column, Progress, Sheet, Task, nothing
from .figures import Line, heat_map, lines, tokens
from .haystack import Hay, Item, prompt, split_answer
from .subject import Subject
from .text import text_of


@dataclass
class RetrievalConfig:
    """The fields of every retrieval task."""

    name: str = option("", "")
    lengths: list[Any] = option(["0.5x", "1x", "2x", "4x"], "tokens of the prompts: 4096, or 2x the attention window")
    depths: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0], "where the needle lies: 0 the start, 1 the end")
    samples: int = option(16, "prompts of each length and depth")
    batch: int = option(8, "prompts read side by side")
    data: Optional[str] = option(None, "text to hide needles in (file, folder, glob or store); null: filler sentences")  # noqa: UP045
    split: Optional[str] = option(None, "val, train or all of the text; null: val of a store, all of a text")  # noqa: UP045
    control: bool = option(True, "also ask without the needle: what the model answers when there is nothing to find")
    piece: int = option(16_384, "tokens read at once, over all prompts")
    seed: int = option(0, "seed of keys, values and places")


class Case(NamedTuple):
    """A cell of the grid; ``depth`` None: needles all over the haystack. ``planted`` False is the control."""

    length: int
    depth: float | None
    planted: bool = True


class Retrieval(Task):
    """A subclass says with ``item`` what is hidden and asked."""

    spread = False  # needles lie all over the haystack: no depths

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sizes = [_size(v) for v in config.lengths]
        if not self.sizes:
            raise LabError("lengths=[]: give at least one, such as lengths=[1x,2x]")
        if not config.depths or not all(0 <= d <= 1 for d in config.depths):
            raise LabError(f"depths={config.depths}: at least one, each from 0 (the start) to 1 (the end)")
        for name in ("samples", "batch", "piece"):
            if getattr(config, name) < 1:
                raise LabError(f"{name}={getattr(config, name)}: must be at least 1")
        if config.seed < 0:
            raise LabError(f"seed={config.seed}: must not be negative")

    def item(self, random: np.random.Generator, depth: float | None) -> Item:
        """A haystack's needles and questions; the same for the same ``random``."""
        raise NotImplementedError

    def chance(self) -> float:
        """How often a guess that knows the form of an answer is right."""
        raise NotImplementedError

    def check(self, subject: Subject) -> None:
        """Turn lengths into tokens, find the text, build one prompt of each length: LabError if one is impossible."""
        window = subject.window
        if window is None and any(relative for _, relative in self.sizes):
            raise LabError(
                f"lengths={self.config.lengths}: the attention of this model has no window; give tokens, such as [1024]"
            )
        self.lengths = sorted({round(v * (window or 0)) if relative else round(v) for v, relative in self.sizes})
        text = None
        if self.config.data is not None:
            text = text_of(subject, self.config.data, self.config.split)
        self.text = "filler sentences" if text is None else text.name
        self.hay = Hay(subject.tokenizer, text, self.lengths[-1])
        asks = [q.ask for i in range(self.config.samples) for q in self.item(self._random(i), 0.5).questions]
        self.tail = max(len(subject.tokenizer.encode(ask)) for ask in asks)  # kept free for the longest question
        for length in self.lengths:
            self._batch(subject, Case(length, None if self.spread else 0.5), range(1))

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        depths: list[float | None] = [None] if self.spread else list(self.config.depths)
        cases = [Case(n, d) for n in self.lengths for d in depths]
        controls = [Case(n, None if self.spread else 0.5, False) for n in self.lengths] if self.config.control else []
        total, done = sum(c.length for c in cases + controls) * self.config.samples, 0
        found: dict[Case, list[dict[str, Any]]] = {}
        for case in controls + cases:
            for start in range(0, self.config.samples, self.config.batch):
                samples = range(start, min(start + self.config.batch, self.config.samples))
                found.setdefault(case, []).extend(self._ask(subject, case, samples))
                done += len(samples) * case.length
                progress(done, total)
        rows, controls_of = [], {c.length: _means(found[c]) for c in controls}
        for case in cases:
            row = {"length": case.length, "depth": case.depth, **_means(found[case])}
            if case.length in controls_of:
                row["control_accuracy"] = controls_of[case.length]["accuracy"]
                row["control_nats"] = controls_of[case.length]["nats"]
                row["gain"] = row["control_nats"] - row["nats"]
            row["example"] = {k: found[case][0][k] for k in ("answer", "written")}
            rows.append(row)
        return {"rows": rows, "window": subject.window, "haystack": self.text, "chance": self.chance()}

    def _random(self, *sample: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *sample])

    def _batch(self, subject: Subject, case: Case, samples: range) -> tuple[list[Item], torch.Tensor, list[Any]]:
        """The items, their haystacks (B, L) and, for each question, the (ask, answer) tokens of every row."""
        tokenizer, items, straw, pairs = subject.tokenizer, [], [], []
        for sample in samples:
            item = self.item(self._random(sample), case.depth)
            asked = [split_answer(tokenizer, q.ask, q.answer) for q in item.questions]
            items.append(item)
            pairs.append(asked)
        for item, sample in zip(items, samples):
            place = self._random(sample, 1)
            straw.append(prompt(item, tokenizer, self.hay, case.length, self.tail, place, planted=case.planted))
        return items, torch.from_numpy(np.stack(straw)), pairs

    def _ask(self, subject: Subject, case: Case, samples: range) -> Iterator[dict[str, Any]]:
        items, straw, pairs = self._batch(subject, case, samples)
        piece = max(256, self.config.piece // len(items))
        _, state = subject.read(straw, piece=piece)
        for number in range(len(items[0].questions)):
            by_length: dict[int, list[int]] = {}
            for row, asked in enumerate(pairs):
                by_length.setdefault(len(asked[number][0]), []).append(row)
            for rows in by_length.values():
                asks = torch.from_numpy(np.stack([pairs[r][number][0] for r in rows]))
                answers = [pairs[r][number][1] for r in rows]
                logits, after = subject.read(asks, state if len(rows) == len(items) else states.rows(state, rows))
                scored = subject.score(logits, after, answers)
                made = subject.follow(logits, after, max(len(a) for a in answers) + 4)
                for i, row in enumerate(rows):
                    question = items[row].questions[number]
                    written = subject.tokenizer.decode(made[i])
                    hits = sum(v in written for v in question.values) / len(question.values)
                    yield {
                        "exact": float(scored.exact[i]),
                        "recall": hits,
                        "accuracy": scored.right[i] / scored.tokens[i],
                        "nats": scored.nats[i] / scored.tokens[i],
                        "answer": question.answer,
                        "written": written,
                    }

    def summary(self, results: dict[str, Any]) -> dict[str, str]:
        window = results["window"]
        seen = "everything" if window is None else f"{window:,} tokens"
        return {
            "hidden in": results["haystack"],
            "attention": f"sees {seen}",
            "chance": f"{results['chance']:.2g} exact",
        }

    def tables(self, results: dict[str, Any]) -> list[Sheet]:
        columns = [Column("length", "length", ",d")]
        columns += [] if self.spread else [Column("depth", "depth", ".2f")]
        columns += [Column("exact", "exact", ".1%"), Column("exact_se", "+-", ".1%"), Column("recall", "recall", ".1%"),
                    Column("accuracy", "tokens right", ".1%"), Column("nats", "nats/token", ".3f")]  # fmt: skip
        if self.config.control:
            columns += [Column("control_accuracy", "without: right", ".1%"),
                        Column("control_nats", "without: nats", ".3f"), Column("gain", "gain", "+.3f")]  # fmt: skip
        return [Sheet(f"{self.config.name}: {self.title()}", tuple(columns), results["rows"])]

    def title(self) -> str:
        """What was asked, in a few words."""
        return "what was hidden, found"

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        rows, window = results["rows"], results["window"]
        keys = {"recall": ("found", 0.0, 1.0, ".0%"), "accuracy": ("tokens of the answer right", 0.0, 1.0, ".0%")}
        if self.config.control:
            most = max(max(r["gain"] for r in rows), 0.1)
            keys["gain"] = ("nats a token gained over a haystack without the needle", 0.0, most, ".2f")
        if self.spread:
            marks = [] if window is None else [(float(window), "attention window")]
            curves = [Line(k, [(r["length"], r[k]) for r in rows]) for k in ("recall", "accuracy", "exact")]
            if self.config.control:
                curves.append(
                    Line("accuracy without", [(r["length"], r["control_accuracy"]) for r in rows], dashed=True)
                )
            return {
                "recall": lines(self.title(), curves, "prompt length, tokens", "share", y_range=(0.0, 1.0), marks=marks)
            }
        names = [_times(n, window) for n in self.lengths]
        cells = {(r["length"], r["depth"]): r for r in rows}
        return {
            key: heat_map(
                f"{self.config.name}: {text}", names, [f"{d:.0%}" for d in self.config.depths],
                [[cells[n, d][key] for n in self.lengths] for d in self.config.depths],
                "prompt length, tokens" + ("" if window is None else " (x attention window)"), "depth of the needle",
                low=low, high=high, form=form,
            )
            for key, (text, low, high, form) in keys.items()
        }  # fmt: skip


def _means(answers: list[dict[str, Any]]) -> dict[str, Any]:
    values = {k: np.asarray([a[k] for a in answers]) for k in ("exact", "recall", "accuracy", "nats")}
    row: dict[str, Any] = {k: float(v.mean()) for k, v in values.items()}
    count = len(answers)
    row["exact_se"] = float(values["exact"].std(ddof=1) / count**0.5) if count > 1 else None
    return row | {"answers": count}


def _size(value: Any) -> tuple[float, bool]:
    """(number, whether it counts attention windows) of 4096 or "2x"."""
    text = str(value)
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise LabError(f"lengths: {value!r} is none; write tokens as 4096, or multiples of the attention window as 2x")
    return number, text.endswith("x")


def _times(length: int, window: int | None) -> str:
    return tokens(length) if window is None else f"{tokens(length)} ({length / window:.3g}x)"
