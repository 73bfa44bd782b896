"""One stream and its state: read, ask, fork, rewind, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..components import state as states
from ..data.tokenizers import Tokenizer
from ..errors import LabError
from ..model import LanguageModel, ModelState
from . import session_file
from .reading import PIECE, Reader, check_tokens
from .sampling import Chooser, Sampling, mark_seen
from .text import StopText, TextStream

TAIL = 16  # last tokens kept: the text of the next one may depend on them
CONTINUE = Sampling()


class Mark(NamedTuple):
    """A place in a stream; never changed, so any number of sessions may share it.

    logits (1, V) float32 of the next token, None before anything was read; seen (1, V) bool; length in tokens.
    """

    state: ModelState | None
    logits: Tensor | None
    seen: Tensor
    length: int
    tail: tuple[int, ...]


class Session:
    """A stream of one model, in constant memory however long it grows (``full`` attention excepted).

        session = Session(model, tokenizer)
        session.read(book)                                         # text, or token ids
        after_book = session.mark()
        for question in questions:
            session.read(question)
            print("".join(session.generate(100, Sampling(temperature=0), stop=["\\n"])))
            session.rewind(after_book)
        session.save("book.session")                               # Session.load("book.session", model, tokenizer)

    The first text begins a document. Texts read one after another are encoded one by one. The model is put in eval
    mode and stays where it is; ``piece`` is the number of tokens read at once. Without a tokenizer a session works on
    token ids, and ``bos_id`` says which one begins a document (None: none does).
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None, *, bos_id: int | None = None,
                 piece: int = PIECE) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.bos_id = tokenizer.bos_id if tokenizer is not None else bos_id
        self.finish: str | None = None  # why the last answer ended: length, stop or document; None while it runs
        self._reader = Reader(model, bos_id=self.bos_id, piece=piece)
        self._pending: list[int] = []  # at most one token: made, and read when something follows it
        # its state is the reader's, and `seen` is its own, changed in place
        unseen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=model.embed.weight.device)
        self._here = Mark(None, None, unseen, 0, ())

    @property
    def length(self) -> int:
        """Tokens of the stream, BOS among them."""
        return self._here.length + len(self._pending)

    @property
    def piece(self) -> int:
        """Tokens that are read at once."""
        return self._reader.piece

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return states.nbytes(self.mark().state)

    def read(self, what: str | bytes | Sequence[int] | Tensor, progress: Callable[[int], None] = lambda count: None,
             ) -> None:
        """Read text (UTF-8) or token ids (L,) of any length; ``progress`` is told how many more tokens were read.

        LabError: nothing to read, an unknown token, text without a tokenizer. Interrupted, the session stays as it was.
        """
        tokens = self.encode(what)
        if not tokens.numel():
            raise LabError("the prompt is empty: there is nothing to read")
        check_tokens(self.model, tokens)
        before = self._pending
        if not self.length and self.bos_id is not None and int(tokens[0]) != self.bos_id:
            before = [self.bos_id]
        tokens = torch.cat([torch.tensor(before, dtype=torch.int64), tokens])
        logits = self._reader.read(tokens[None], progress)
        here, self._pending = self._here, []
        mark_seen(here.seen, tokens[None], self.bos_id)
        tail = (*here.tail, *tokens[-TAIL:].tolist())[-TAIL:]
        self._here = Mark(None, logits, here.seen, here.length + len(tokens), tail)

    def encode(self, what: str | bytes | Sequence[int] | Tensor) -> Tensor:
        """Token ids (L,) int64 on the CPU of text, or of ids; no BOS is added. LabError: text without a tokenizer."""
        if isinstance(what, str | bytes):
            if self.tokenizer is None:
                raise LabError("this session has no tokenizer: give token ids")
            return torch.from_numpy(self.tokenizer.encode(what).astype("int64"))
        return torch.as_tensor(what, dtype=torch.int64).flatten().cpu()

    def tokens(self, length: int, sampling: Sampling = CONTINUE) -> Iterator[int]:
        """Make up to ``length`` tokens; a document that the model ends is the end, and its BOS is neither given nor
        read. What was given is part of the stream, however many tokens were taken."""
        if self._here.logits is None:
            if self.bos_id is None:
                raise LabError("nothing was read yet: give the session a prompt first")
            self.read([self.bos_id])
        self.finish = None
        known = self.tokenizer.vocab_size if self.tokenizer is not None else None
        chooser = Chooser(sampling, [sampling.seed], vocab_size=known, bos_id=self.bos_id, seen=self._here.seen)
        for _ in range(length):
            self._settle()
            assert self._here.logits is not None
            token = chooser.choose(self._here.logits)[0]
            if token == self.bos_id:
                self.finish = "document"
                return
            self._pending = [token]
            yield token
        self.finish = "length"

    def generate(self, length: int = 256, sampling: Sampling = CONTINUE, stop: Sequence[str] = ()) -> Iterator[str]:
        """Text as it is made, at most ``length`` tokens, without the first stop string and what follows it.

        The stop string's tokens are part of the stream, so that what is read next continues after it.
        """
        if self.tokenizer is None:
            raise LabError("this session has no tokenizer: use tokens()")
        text, stops = TextStream(self.tokenizer, (*self._here.tail, *self._pending)), StopText(stop)
        for token in self.tokens(length, sampling):
            if piece := stops.push(text.push(token)):
                yield piece
            if stops.stopped:
                self.finish = "stop"
                return
        if rest := stops.push(text.end()) + stops.end():
            yield rest
        if stops.stopped:
            self.finish = "stop"

    def mark(self) -> Mark:
        """This place, to come back to; it costs the memory of one state."""
        self._settle()
        return self._here._replace(state=self._reader.state, seen=self._here.seen.clone())

    def rewind(self, mark: Mark) -> None:
        """Go back, or anywhere, to a place of a stream of this model."""
        self._here = mark._replace(state=None, seen=mark.seen.clone())
        self._pending, self.finish = [], None
        self._reader.state = mark.state

    def fork(self) -> Session:
        """Another session at the same place; the two go on independently."""
        other = Session(self.model, self.tokenizer, bos_id=self.bos_id, piece=self.piece)
        other.rewind(self.mark())
        return other

    def save(self, path: str | Path) -> None:
        """Write the place to a file, at once or not at all: safetensors with a JSON description and checksum.

        LabError: nothing was read yet, or the file cannot be written (an older one stays).
        """
        session_file.save(Path(path), self.model, self.tokenizer, self.bos_id, self.mark())

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, tokenizer: Tokenizer | None = None, *, piece: int = PIECE,
             ) -> Session:
        """Go on where ``save`` was called. LabError: no session, a damaged one, another model, tokenizer or version."""
        session = cls(model, tokenizer, piece=piece)
        session.bos_id, mark = session_file.load(Path(path), session.model, tokenizer)
        session._reader.bos_id = session.bos_id
        session.rewind(mark)
        return session

    def _settle(self) -> None:
        """Read the token that was made last."""
        if self._pending:
            logits = self._reader.step(self._pending)
            here, made = self._here, self._pending
            self._here = Mark(None, logits, here.seen, here.length + 1, (*here.tail, *made)[-TAIL:])
            self._pending = []

