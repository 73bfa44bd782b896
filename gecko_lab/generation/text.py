"""Tokens to text as they come: whole characters, and never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..data.tokenizers import Tokenizer
from ..errors import LabError


class TextStream:
    """Tokens to text as they come: characters whole, and all of them together what ``decode`` says of the tokens.

    ``after`` are the last tokens before the stream: some tokenizers write a token otherwise at a text's beginning.
    """

    LONGEST = 16  # tokens that may wait for the rest of a character

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.name == "bytes" else None
        self._shown = list(after)  # the tokens of the last text: a decoder may join or space what follows them
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        if self._bytes is not None:
            return self._bytes.decode(bytes([token]) if token < 256 else b"")
        self._waiting.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._waiting) < self.LONGEST:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """What still waits, broken characters replaced."""
        text = self._bytes.decode(b"", final=True) if self._bytes is not None else self._text()
        self._waiting = []
        return text

    def _text(self) -> str:
        before = self.tokenizer.decode(self._shown)
        return self.tokenizer.decode(self._shown + self._waiting)[len(before) :]


class StopText:
    """Lets text through up to the first stop string that is complete, and holds back what may become one.

    ``stopped`` is set when one was found; of two that end at the same place the longer counts. LabError: an empty one.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise LabError("stop string '': empty, it would stop every text before its first character")
        self.stops, self.stopped = tuple(stops), False
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now."""
        self._held += text
        found = [(self._held.index(stop) + len(stop), -len(stop)) for stop in self.stops if stop in self._held]
        if found:
            end, size = min(found)
            self.stopped = True
            shown, self._held = self._held[: end + size], ""
            return shown
        kept = self._begun()
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def end(self) -> str:
        """What was held back for a stop string that did not come."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self) -> int:
        """Characters at the end of the text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self.stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self.stops):
                return size
        return 0
