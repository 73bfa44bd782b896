"""Many prompts side by side, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import state as states
from ..data.tokenizers import Tokenizer
from ..errors import LabError
from ..model import LanguageModel
from .reading import PIECE, Reader, check_tokens
from .sampling import Chooser, Sampling, mark_seen
from .session import TAIL, Mark
from .text import StopText, TextStream

ROWS = 16


class Batch:
    """Continues prompts of different lengths, up to ``rows`` of them side by side.

    A state's position is one number for all its rows (the chunks lie on an absolute grid), so the rows of a group
    advance together: all read up to the end of the shortest prompt; then token by token, in which a row that has read
    its prompt takes the token that it made and another the next of its prompt; and again whole pieces as soon as no row
    is making tokens. Prompts are grouped by length to that end, and rows that are done leave.

    So a row does what it does alone, and its seed is its own, ``sampling.seed`` + its index. Its numbers are those of
    running it alone but for the rounding of matrix products, which add in another order for another count of rows:
    where that must not decide between two equally likely tokens, ``rows=1`` runs prompt after prompt, bit for bit as
    alone.

    Iterating gives (index of the prompt, token); ``finish(index)`` ends one early. ``reasons[index]`` says why it
    ended: length, document (the model gave BOS, which is not passed on) or what ``finish`` was told.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int] | Tensor],
        length: int,
        *,
        bos_id: int | None = None,
        sampling: Sampling | None = None,
        vocab_size: int | None = None,
        start: Mark | None = None,
        rows: int = ROWS,
        piece: int = PIECE,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """prompts are token ids (L,); a document begins with ``bos_id``, unless ``start``, a mark of a session, says
        where all of them begin. ``progress`` is told how many more tokens of prompts were read.

        LabError: an empty prompt with nothing before it, an unknown token, ``rows`` below 1.
        """
        if rows < 1:
            raise LabError(f"rows={rows}: must be at least 1")
        self.model, self.length, self.bos_id, self.vocab_size = model.eval(), length, bos_id, vocab_size
        self.sampling, self.rows, self.piece, self.progress = sampling or Sampling(), rows, piece, progress
        self.start = start if start is not None and start.logits is not None else None
        self.prompts = [self._prompt(i, prompt) for i, prompt in enumerate(prompts)]
        self.reasons: dict[int, str] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        for begin in range(0, len(order), self.rows):
            yield from self._group(order[begin : begin + self.rows])

    def finish(self, index: int, reason: str = "stop") -> None:
        """Make no more tokens for this prompt."""
        self.reasons.setdefault(index, reason)

    def _prompt(self, index: int, prompt: Sequence[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(prompt, dtype=torch.int64).flatten().cpu()
        check_tokens(self.model, tokens)
        begins = self.start is None and self.bos_id is not None
        if begins and (not len(tokens) or int(tokens[0]) != self.bos_id):
            tokens = torch.cat([torch.tensor([self.bos_id]), tokens])
        if not len(tokens) and self.start is None:
            raise LabError(f"prompt {index} is empty: give at least one token")
        return tokens

    def _group(self, group: list[int]) -> Iterator[tuple[int, int]]:
        """Rows of one reader; ``group`` has the index of each row's prompt, ``at`` tokens of it are read."""
        reader = Reader(self.model, len(group), bos_id=self.bos_id, piece=self.piece)
        weight = self.model.head.weight
        seen = torch.zeros(len(group), weight.shape[0], dtype=torch.bool, device=weight.device)
        logits, at, made = None, 0, dict.fromkeys(group, 0)
        if self.start is not None:
            reader.state = states.rows(self.start.state, [0] * len(group))
            logits, seen = self.start.logits, seen | self.start.seen
            logits = logits.expand(len(group), -1) if logits is not None else None
        for row, index in enumerate(group):
            mark_seen(seen[row : row + 1], self.prompts[index][None], self.bos_id)
        seeds = [self.sampling.seed + index for index in group]
        chooser = Chooser(self.sampling, seeds, vocab_size=self.vocab_size, bos_id=self.bos_id, seen=seen)
        for index in group if self.length < 1 else ():
            self.finish(index, "length")
        while True:
            making = [r for r, i in enumerate(group) if len(self.prompts[i]) <= at and i not in self.reasons]
            tokens = [0] * len(group)  # of a row that is done: read and not looked at
            if making:
                assert logits is not None
                for row, token in zip(making, chooser.choose(logits, making), strict=True):
                    index, tokens[row] = group[row], token
                    if token == self.bos_id:
                        self.finish(index, "document")
                        continue
                    made[index] += 1
                    yield index, token
                    if made[index] == self.length:
                        self.finish(index, "length")
            open_rows = [r for r, i in enumerate(group) if i not in self.reasons]
            reading = [r for r in open_rows if len(self.prompts[group[r]]) > at]
            if not open_rows:
                return
            pieces = len(reading) == len(open_rows)
            if len(open_rows) <= len(group) // 2 or (pieces and len(open_rows) < len(group)):
                tokens = [tokens[row] for row in open_rows]
                group = self._leave(group, open_rows, reader, chooser)
                reading = [r for r, i in enumerate(group) if len(self.prompts[i]) > at]
            if pieces:
                size = min(len(self.prompts[i]) for i in group) - at
                block = torch.stack([self.prompts[i][at : at + size] for i in group])
                logits = reader.read(block, lambda count: self.progress(count * len(group)))  # noqa: B023 (called now)
                at += size
            else:
                for row in reading:
                    tokens[row] = int(self.prompts[group[row]][at])
                logits = reader.step(tokens)
                self.progress(len(reading))
                at += 1

    def _leave(self, group: list[int], rows: list[int], reader: Reader, chooser: Chooser) -> list[int]:
        if reader.state is not None:
            reader.keep(rows)
        chooser.keep(rows)
        return [group[row] for row in rows]


class Answer(NamedTuple):
    """What the prompt of this index was continued with; ``finish`` is length, stop or document."""

    prompt: int
    text: str
    tokens: list[int]
    finish: str


def answers(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    *,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    start: Mark | None = None,
    rows: int = ROWS,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Answer]:
    """The continuation of each text as soon as it is whole, not always in their order; see ``Batch``."""
    encoded = [torch.from_numpy(tokenizer.encode(prompt).astype("int64")) for prompt in prompts]
    batch = Batch(model, encoded, length, bos_id=tokenizer.bos_id, sampling=sampling, start=start, rows=rows,
                  vocab_size=tokenizer.vocab_size, progress=progress)  # fmt: skip
    texts = [TextStream(tokenizer, prompt[-TAIL:].tolist()) for prompt in encoded]
    stops = [StopText(stop) for _ in prompts]
    shown, made = [""] * len(prompts), [[] for _ in prompts]  # type: list[str], list[list[int]]
    given: set[int] = set()

    def whole() -> Iterator[Answer]:
        for index in sorted(batch.reasons.keys() - given):
            given.add(index)
            if not stops[index].stopped:
                shown[index] += stops[index].push(texts[index].end())
            if not stops[index].stopped:
                shown[index] += stops[index].end()
            finish = "stop" if stops[index].stopped else batch.reasons[index]
            yield Answer(index, shown[index], made[index], finish)

    for index, token in batch:
        made[index].append(token)
        shown[index] += stops[index].push(texts[index].push(token))
        if stops[index].stopped:
            batch.finish(index)
        yield from whole()
    yield from whole()
