"""Loss by context length over millions of tokens: does what was read long ago still help, and what does it cost?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

from ..components import state as states
from ..components.registry import nearest, option
from ..decoder import Decoder
from ..errors import LabError
from . import state_norms
from .base import TASKS, Column, Progress, Sheet, Task, nothing
from .figures import Line, lines
from .meter import Meter
from .streams import BLOCK, KINDS, Streams
from .subject import Subject
from .text import text_of

GROUPS = 32  # of neighbouring blocks in a bucket, whose means give the standard error


@TASKS.register("length")
class Length(Task):
    """Reads streams with the state carried, in constant memory, and sorts what was predicted by how much stood before.

    Buckets of context length end at ``first``, 2 ``first``, 4 ``first``, ... A row of the results has the mean loss
    with its standard error (batch means of up to 32 neighbouring parts: neighbouring tokens are not independent),
    perplexity, bits per byte, speed and memory of the pieces in which the bucket lies, the state's bytes; and for every
    length of ``restart`` the loss of the same tokens when the state is thrown away every so many tokens, with the
    paired difference.
    """

    @dataclass
    class Config:
        name: str = option("length", "loss and perplexity by context length, with speed, memory and the state's norms")
        data: Optional[str] = option(None, "text (file, folder, glob), token store or stdlib; null: the run's own")  # noqa: UP045
        split: Optional[str] = option(None, "val, train or all; null: val of the run's data or a store, all of a text")  # noqa: UP045
        documents: str = option(
            "concatenated", "concatenated (one long text), whole (long documents) or reset (at BOS)"
        )
        tokens: int = option(4_194_304, "tokens of a stream at most; 0: to the end of the text")
        streams: int = option(1, "streams side by side: equal parts of the text, or the longest documents")
        first: int = option(1024, "end of the first bucket of context lengths; each following one ends at its double")
        piece: int = option(16_384, "tokens read at once")
        restart: list[int] = option([], "also with the state thrown away every so many tokens, to compare with")
        decode: int = option(0, "also time so many single tokens after the contexts; 0: do not")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.documents not in KINDS:
            raise LabError(f"documents={config.documents}: unknown. {nearest(config.documents, list(KINDS))}")
        for name in ("first", "piece", "tokens"):
            value = getattr(config, name)
            if value % BLOCK or (value < BLOCK and not (name == "tokens" and value == 0)):
                raise LabError(f"{name}={value}: must be a positive multiple of {BLOCK}")
        for value in config.restart:
            if value % BLOCK or value < BLOCK:
                raise LabError(f"restart={config.restart}: {value} must be a positive multiple of {BLOCK}")
        if config.streams < 1 or config.decode < 0:
            raise LabError(f"streams={config.streams} decode={config.decode}: at least 1, and not negative")

    def check(self, subject: Subject) -> None:
        """Find the text: LabError where there is none, too little, or of another tokenizer."""
        c = self.config
        self.text = text_of(subject, c.data, c.split)
        self.streams = Streams(self.text.source, subject.tokenizer, c.documents, c.streams, c.tokens, self.text.name)
        longest = int(self.streams.lengths[0])
        if longest < 2 * c.first:
            raise LabError(
                f"{self.text.name}: a stream has {longest:,} tokens, less than two buckets of first={c.first:,}; give "
                "a longer text, fewer streams or a smaller first"
            )
        self.edges = [c.first]
        while self.edges[-1] < longest:
            self.edges.append(min(2 * self.edges[-1], longest))
        if len(self.edges) > 2 and self.edges[-1] < 1.25 * self.edges[-2]:  # no bucket of a few tokens at the end
            del self.edges[-2]

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        rows = len(self.streams.lengths)
        blocks = int(self.streams.lengths[0]) // BLOCK
        series = [0, *self.config.restart]
        total, done = int(self.streams.lengths.sum()) * len(series), 0
        nats = np.full((len(series), rows, blocks), np.nan)
        sizes = np.zeros((rows, blocks))
        meter = Meter(subject.device)
        reader = _Reader(subject, self.streams, self.config.piece)
        extra: dict[str, list[dict[str, Any]]] = {"state": [], "decode": []}
        reader.warm_up()
        kept = [(self.config.first, self._early(subject))] if self.config.decode else []
        for number, every in enumerate(series):
            for part in reader.restarted(every) if every else reader.carried(meter):
                span = slice(part.begin // BLOCK, (part.begin + part.width) // BLOCK)
                nats[number, : len(part.nats), span] = part.nats
                sizes[: len(part.nats), span] = part.sizes
                done += part.nats.size * BLOCK
                progress(min(done, total), total)
                reached = [e for e in self.edges if part.begin < e <= part.begin + part.width]
                if not every and reached:
                    extra["state"] += state_norms.of(part.state, part.begin + part.width)
                    if self.config.decode:
                        kept.append((part.begin + part.width, states.to(part.state, "cpu")))
        extra["decode"] = [self._decode(subject, state, context) for context, state in kept]
        for row, length in enumerate(self.streams.lengths):
            nats[:, row, length // BLOCK :] = np.nan
        return self._results(nats, sizes, meter, extra)

    def _results(self, nats: np.ndarray, sizes: np.ndarray, meter: Meter, extra: dict[str, Any]) -> dict[str, Any]:
        found, before = [], 0
        for edge in self.edges:
            span = slice(before // BLOCK, edge // BLOCK)
            carried = nats[0, :, span]
            loss, error = mean_and_error(carried)
            real = ~np.isnan(carried)
            row = {"from": before + 1, "to": edge, "tokens": int(real.sum()) * BLOCK, "loss": loss, "loss_se": error}
            row |= {"perplexity": math.exp(loss) if loss < 700 else None}
            size = float(sizes[:, span][real].sum())
            row["bits_per_byte"] = float(np.nansum(carried)) / math.log(2) / size if size else None
            for number, every in enumerate(self.config.restart, start=1):
                other = nats[number, :, span]
                row[f"loss_restart_{every}"] = mean_and_error(other)[0]
                row[f"gain_{every}"], row[f"gain_{every}_se"] = mean_and_error(other - carried)
            row |= meter.between(before, edge)
            found.append(row)
            before = edge
        known = ~np.isnan(nats[0])
        return {
            "rows": found,
            **extra,
            "pieces": [cost._asdict() for cost in meter.costs],
            "loss": float(nats[0][known].sum() / known.sum() / BLOCK),
            "tokens": int(known.sum()) * BLOCK,
            "data": self.text.name,
            "split": self.text.split,
            "text_fingerprint": self.text.source.fingerprint,
        }

    def _early(self, subject: Subject) -> Any:
        """The state after the first bucket, on the CPU."""
        tokens = torch.from_numpy(self.streams.read(0, self.config.first)[:, :-1])
        _, state = subject.features(tokens, None, self._bos(subject))
        return states.to(state, "cpu")

    def _bos(self, subject: Subject) -> int | None:
        return None if self.config.documents == "concatenated" else subject.tokenizer.bos_id

    def _decode(self, subject: Subject, state: Any, context: int) -> dict[str, Any]:
        """Milliseconds of one more token for all rows, a few first ones aside."""
        rows = len(states.tensors(state)[0])
        token = torch.zeros(rows, dtype=torch.int64, device=subject.device)
        decoder = Decoder(subject.model, states.to(state, subject.device), rows)
        with subject.inference():
            for _ in range(8):
                decoder.step(token)
            _wait(subject.device)
            began = time.perf_counter()
            for _ in range(self.config.decode):
                decoder.step(token)
            _wait(subject.device)
        return {"context": context, "ms_per_token": (time.perf_counter() - began) * 1e3 / self.config.decode}

    def summary(self, results: dict[str, Any]) -> dict[str, str]:
        read = f"{results['data']}, {results['split']}: {results['tokens']:,} tokens, {self.config.documents}"
        return {"data": read, "loss": f"{results['loss']:.4f} nats a token over all"}

    def tables(self, results: dict[str, Any]) -> list[Sheet]:
        columns = [Column("to", "context up to", ",d"), Column("loss", "loss", ".4f"), Column("loss_se", "+-", ".4f"),
                   Column("perplexity", "perplexity", ".3f"), Column("bits_per_byte", "bits/byte", ".4f")]  # fmt: skip
        for every in self.config.restart:
            columns += [Column(f"gain_{every}", f"gain on {every:,}", "+.4f"), Column(f"gain_{every}_se", "+-", ".4f")]
        columns += [Column("tokens_per_second", "tokens/s", ",.0f"), Column("memory_mb", "memory MB", ",.1f"),
                    Column("state_kb", "state kB", ",.1f")]  # fmt: skip
        sheets = [Sheet("Loss by context length", tuple(columns), results["rows"])]
        if results["decode"]:
            timed = (Column("context", "context", ",d"), Column("ms_per_token", "ms a token", ".3f"))
            sheets.append(Sheet("One more token after a context", timed, results["decode"]))
        return sheets

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        rows, axis = results["rows"], "context length, tokens"
        at = lambda key, scale=1.0: [(r["to"], r[key] * scale) for r in rows if r.get(key) is not None]
        band = [(r["to"], r["loss"] - 2 * r["loss_se"], r["loss"] + 2 * r["loss_se"]) for r in rows if r["loss_se"]]
        curves = [Line("state carried", at("loss"), band)]
        curves += [Line(f"restarted every {e:,}", at(f"loss_restart_{e}"), dashed=True) for e in self.config.restart]
        made = {"loss": lines("Loss by context length", curves, axis, "nats a token, +- 2 standard errors")}
        if self.config.restart:
            gains = [Line(f"over restarts every {e:,}", at(f"gain_{e}"),
                          [(r["to"], r[f"gain_{e}"] - 2 * r[f"gain_{e}_se"], r[f"gain_{e}"] + 2 * r[f"gain_{e}_se"])
                           for r in rows if r[f"gain_{e}_se"]]) for e in self.config.restart]  # fmt: skip
            made["gain"] = lines("What the carried state is worth", gains, axis, "nats a token saved")
        made["speed"] = lines("Speed", [Line("reading", at("tokens_per_second"))], axis, "tokens a second",
                              y_range=(0.0, 1.1 * max(r["tokens_per_second"] for r in rows)))  # fmt: skip
        used = [Line("peak memory" if results.get("peak_memory_bytes") else "resident memory", at("memory_mb"))]
        made["memory"] = lines("Memory", [*used, Line("state", at("state_kb", 1e-3))], axis, "MB", log_y=True)
        made["state"] = state_norms.figure(results["state"])
        return made


@dataclass(frozen=True)
class _Part:
    """What a piece gave: nats and bytes of its blocks (rows, width / BLOCK), and the state after it."""

    begin: int
    width: int
    nats: np.ndarray
    sizes: np.ndarray
    state: Any


class _Reader:
    """Reads the streams from the start, a piece at a time."""

    def __init__(self, subject: Subject, streams: Streams, piece: int) -> None:
        self.subject, self.streams, self.piece = subject, streams, piece
        self.bos = None if streams.kind == "concatenated" else subject.tokenizer.bos_id

    def warm_up(self) -> None:
        """Read a beginning that is not measured, for what is compiled, tuned or allocated at first use."""
        began, least = time.perf_counter(), 2.0 if self.subject.device.type == "cuda" else 0.0
        for part in self.carried():
            if part.begin > 0 and time.perf_counter() - began >= least:
                break

    def carried(self, meter: Meter | None = None) -> Iterator[_Part]:
        """With the state carried; ``meter`` learns what each piece took."""
        state: Any = None
        end = int(self.streams.lengths[0])
        for begin in range(0, end, self.piece):
            width = min(self.piece, end - begin)
            block = torch.from_numpy(self.streams.read(begin, width))
            if state is not None:
                state = states.rows(state, slice(0, len(block)))
            if meter is not None:
                meter.start()
            nats, state = self._read(block[:, :-1], block[:, 1:], state)
            if meter is not None:
                meter.stop(begin, begin + width, len(block) * width, states.nbytes(state))
            yield self._part(begin, block, nats, state)

    def restarted(self, every: int) -> Iterator[_Part]:
        """With a fresh state at every multiple of ``every``: short stretches lie side by side as rows."""
        end, state = int(self.streams.lengths[0]), None
        step = max(every, self.piece // every * every)
        for outer in range(0, end, step):
            full = min(step, end - outer) // every * every
            spans = [(outer, full)] if full and every <= self.piece else []
            begin, stop = outer + sum(w for _, w in spans), min(outer + step, end)
            spans += [(b, min(self.piece, stop - b)) for b in range(begin, stop, self.piece)]
            for begin, width in spans:
                block = torch.from_numpy(self.streams.read(begin, width))
                tokens, targets = block[:, :-1], block[:, 1:]
                if (begin, width) == (outer, full) and every <= self.piece:
                    tokens, targets = (x.reshape(-1, every) for x in (tokens, targets))
                fresh = begin % every == 0
                state = None if fresh else states.rows(state, slice(0, len(block)))
                nats, state = self._read(tokens, targets, state)
                yield self._part(begin, block, nats, state)

    def _read(self, tokens: torch.Tensor, targets: torch.Tensor, state: Any) -> tuple[np.ndarray, Any]:
        features, state = self.subject.features(tokens, state, self.bos)
        losses = self.subject.losses(features, targets)
        return losses.double().unflatten(1, (-1, BLOCK)).sum(-1).cpu().numpy(), state

    def _part(self, begin: int, block: torch.Tensor, nats: np.ndarray, state: Any) -> _Part:
        sizes = self.streams.sizes(block[:, 1:].numpy()).reshape(len(block), -1, BLOCK).sum(-1)
        return _Part(begin, block.shape[1] - 1, nats.reshape(len(block), -1), sizes, state)


def mean_and_error(sums: np.ndarray) -> tuple[float, float | None]:
    """Mean a token and its standard error, from sums (rows, blocks) of BLOCK tokens each; NaN blocks do not count.

    The error is that of the means of up to GROUPS groups of neighbouring blocks; None of fewer than two.
    """
    known = sums[~np.isnan(sums)] / BLOCK
    if not len(known):
        return float("nan"), None
    parts = np.array_split(known, min(GROUPS, len(known)))
    means = np.asarray([p.mean() for p in parts])
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return float(known.mean()), error


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
