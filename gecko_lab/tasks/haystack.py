"""Prompts of an exact number of tokens: needles at given depths in filler sentences or in the user's own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..data.tokenizers import Tokenizer
from ..errors import LabError
from ..evaluation import Text
from .streams import Streams

# The filler of the passkey task as published (Mohtashami and Jaggi, 2023).
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class Question:
    """What a prompt asks and what answers it: ``values`` are the strings that an answer must contain, ``answer`` is the
    text that the model should write after ``ask``."""

    ask: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One haystack: a head, needles as (text, depth from 0 to 1), and the questions about them."""

    needles: tuple[tuple[str, float], ...]
    questions: tuple[Question, ...]
    head: str = ""
    noise: tuple[str, ...] = field(default=())  # sentences that fill the haystack instead of filler or text


class Hay:
    """What needles are hidden in: ``take`` gives any number of tokens of it."""

    def __init__(self, tokenizer: Tokenizer, text: Text | None, longest: int) -> None:
        """LabError when the text is shorter than the ``longest`` prompt."""
        self.tokenizer, self.streams = tokenizer, None
        self.filler = tokenizer.encode(FILLER).astype(np.int64)
        if text is not None:
            have = text.source.token_count
            if have < longest:
                raise LabError(
                    f"{text.name}: has {have:,} tokens, the longest prompt {longest:,}: more text or smaller lengths"
                )
            self.streams = Streams(text.source, tokenizer, "concatenated", 1, 0, text.name)

    def take(self, count: int, random: np.random.Generator, noise: Sequence[str] = ()) -> np.ndarray:
        """``count`` tokens, from a random place of the text, or from the start of a filler sentence on."""
        if noise:
            return self._fill(np.concatenate([self.tokenizer.encode(s).astype(np.int64) for s in noise]), count)
        if self.streams is None:
            return self._fill(self.filler, count)
        have = int(self.streams.ends[-1])
        start = int(random.integers(0, have - count + 1))
        return self.streams.span(start, start + count)

    def _fill(self, part: np.ndarray, count: int) -> np.ndarray:
        return np.tile(part, -(-count // len(part)))[:count]


def split_answer(tokenizer: Tokenizer, ask: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the question and of the answer as they are together: where a token spans the seam it is answer."""
    whole = tokenizer.encode(ask + answer).astype(np.int64)
    alone = tokenizer.encode(ask).astype(np.int64)
    same = 0
    while same < min(len(alone), len(whole) - 1) and alone[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def prompt(
    item: Item,
    tokenizer: Tokenizer,
    hay: Hay,
    length: int,
    tail: int,
    random: np.random.Generator,
    *,
    planted: bool = True,
) -> np.ndarray:
    """The first ``length`` - ``tail`` tokens of a prompt: BOS, head, and the haystack with its needles. The question,
    at most ``tail`` tokens, comes after it. ``planted`` false has no needles and as much more hay: the control.

    LabError when the length does not hold them.
    """
    head = tokenizer.encode(item.head).astype(np.int64) if item.head else np.zeros(0, dtype=np.int64)
    needles = [(tokenizer.encode(text).astype(np.int64), depth) for text, depth in item.needles]
    room = length - tail - 1 - len(head) - sum(len(n) for n, _ in needles)
    if room < 0:
        raise LabError(f"lengths: {length:,} tokens are too few, this task needs {length - room:,} at least")
    if not planted:
        room, needles = length - tail - 1 - len(head), []
    straw = hay.take(room, random, item.noise)
    parts, done = [np.asarray([tokenizer.bos_id]), head], 0
    for needle, depth in sorted(needles, key=lambda n: n[1]):
        at = max(done, _snap(straw, round(depth * room), tokenizer))
        parts += [straw[done:at], needle]
        done = at
    return np.concatenate([*parts, straw[done:]])


def _snap(straw: np.ndarray, at: int, tokenizer: Tokenizer) -> int:
    """Back to the end of a sentence or word, where tokens are bytes and a place may lie inside a word."""
    if tokenizer.name != "bytes" or at in (0, len(straw)):
        return at
    before = straw[max(0, at - 200) : at]
    for marks in (".!?\n", " "):
        ends = np.flatnonzero(np.isin(before, [ord(m) for m in marks]))
        if len(ends):
            return at - len(before) + int(ends[-1]) + 1
    return at
