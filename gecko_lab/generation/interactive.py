"""A conversation with a model on a terminal: lines are read into a session, and the model goes on from them."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..components import state as states
from ..components.registry import nearest
from ..errors import LabError
from .sampling import Sampling
from .session import Mark, Session
from .terminal import clean, reading

UNDO_BYTES = 1 << 30  # of states kept for /rewind


class Interrupted(Exception):
    """Ctrl-C while a text is read."""


class Conversation:
    """Named sessions of one model, one of them the current one; every line of the user is a turn that /rewind undoes.

    Ctrl-C ends the answer, or gives up the reading, and leaves the session whole; at the prompt it does nothing.
    """

    def __init__(self, session: Session, sampling: Sampling, length: int, stop: list[str], err: Console) -> None:
        self.sessions, self.name = {"main": session}, "main"
        self.undo: dict[str, deque[Mark]] = {"main": deque()}
        self.sampling, self.length, self.stop, self.err = sampling, length, stop, err
        self.template, self.turns = "{}", 0
        self._interrupted = False
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self.help),
            "read": ("FILE", "read a text file into the session, without an answer", self.read_file),
            "rewind": ("[N]", "forget the last turn, or the last N: line and answer", self.rewind),
            "fork": ("NAME", "copy this session and go on in the copy", self.fork),
            "switch": ("NAME", "go on in another session", self.switch),
            "list": ("", "the sessions, and what each has read", self.list),
            "save": ("FILE", "save this session; --session FILE or /load FILE continue it", self.save),
            "load": ("FILE NAME", "read a saved session in under a new name", self.load),
            "template": ("TEXT", "a text around each line, {}: /template Question: {}\\nAnswer:", self.set_template),
            "set": ("NAME VALUE", "length, stop, or a sampling option: /set top-p 0.9; alone: show all", self.set),
            "quit": ("", "leave (Ctrl-D does, too)", lambda _: None),
        }

    @property
    def session(self) -> Session:
        return self.sessions[self.name]

    def run(self) -> int:
        """Until /quit or the end of the input; 0."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (history and editing of input())
        while True:
            try:
                line = input(f"[{self.name} {self.session.length:,}]> ")
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                self.err.print("\n(/quit or Ctrl-D leaves)")
                continue
            try:
                if line.strip() in ("/quit", "/exit", "/q"):
                    return 0
                if line.startswith("/") and not line.startswith("//"):
                    self.command(line[1:])
                else:
                    self.turn(line[1:] if line.startswith("//") else line)
            except LabError as error:
                self.err.print(f"[bold red]error:[/] {escape(str(error))}", markup=True)

    def command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            raise LabError(f"unknown command /{name}. {nearest(name, list(self.commands))} (//text is a text with a /)")
        wanted, rest = self.commands[name][0], rest.strip()
        if wanted and not wanted.startswith("[") and name != "set" and not rest:
            raise LabError(f"/{name} {wanted}: what is missing?")
        self.commands[name][2](rest)

    def turn(self, line: str) -> None:
        """Read the line (an empty one: nothing, the model just goes on) and print the answer."""
        before = self.session.mark()
        with self._watching():
            try:
                if line:
                    self._read(self.template.replace("{}", line))
            except Interrupted:
                self.err.print("(not read)")
                return
            self._remember(before)
            began, made = time.perf_counter(), self.session.length
            sampling = replace(self.sampling, seed=self.sampling.seed + self.turns)
            self.turns += 1
            for piece in self.session.generate(self.length, sampling, self.stop):
                sys.stdout.write(clean(piece))
                sys.stdout.flush()
                if self._interrupted:
                    break
        made, seconds = self.session.length - made, max(time.perf_counter() - began, 1e-9)
        reason = {"document": "the model ended the document", "stop": "a stop string", "length": "Enter goes on"}
        end = "stopped" if self._interrupted else reason.get(self.session.finish or "", "")
        print(flush=True)
        self.err.print(f"({made:,} tokens, {made / seconds:,.0f} a second; {end})", style="dim")

    def help(self, _: str) -> None:
        self.err.print("A line is read, and the model continues it. An empty line lets it go on. Commands:")
        for name, (wanted, text, _f) in self.commands.items():
            self.err.print(f"  /{name + ' ' + wanted:<18} {text}")

    def read_file(self, name: str) -> None:
        from ..generate import read_text

        text, before = read_text(Path(name)), self.session.mark()
        with self._watching():
            try:
                self._read(text)
            except Interrupted:
                self.err.print("(not read)")
                return
        self._remember(before)
        self.err.print(f"{name}: {self.session.length - before.length:,} tokens read")

    def rewind(self, turns: str) -> None:
        count, kept = _whole(turns or "1", "/rewind N"), self.undo[self.name]
        if not 1 <= count <= len(kept):
            raise LabError(f"/rewind {count}: {len(kept)} turn(s) are kept")
        for _ in range(count):
            mark = kept.pop()
        self.session.rewind(mark)

    def fork(self, name: str) -> None:
        self._new(name)
        self.sessions[name], self.undo[name] = self.session.fork(), deque(self.undo[self.name])
        self.name = name

    def switch(self, name: str) -> None:
        if name not in self.sessions:
            raise LabError(f"no session {name!r}. {nearest(name, list(self.sessions))}")
        self.name = name

    def list(self, _: str) -> None:
        for name, session in self.sessions.items():
            here = "*" if name == self.name else " "
            self.err.print(f"{here} {name}: {session.length:,} tokens, a state of {session.nbytes / 1e6:,.2f} MB")

    def save(self, name: str) -> None:
        self.session.save(Path(name))
        self.err.print(f"saved: {name}, {self.session.length:,} tokens read, {Path(name).stat().st_size / 1e6:,.1f} MB")

    def load(self, words: str) -> None:
        file, _, name = words.rpartition(" ")
        if not file:
            raise LabError("/load FILE NAME: the new session needs a name")
        self._new(name)
        here = self.session
        self.sessions[name] = Session.load(file.strip(), here.model, here.tokenizer, piece=here.piece)
        self.undo[name], self.name = deque(), name

    def set_template(self, text: str) -> None:
        if "{}" not in text:
            raise LabError("/template TEXT: must hold {} where the line goes, such as Q: {}\\nA:")
        self.template = _unescape(text)

    def set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        name = name.replace("-", "_")
        kinds = {item.name: int if item.name in ("top_k", "seed") else float for item in fields(Sampling)}
        if name == "length":
            self.length = _whole(value, "/set length N")
        elif name == "stop":
            self.stop = [_unescape(value)] if value else []
        elif name in kinds:
            try:
                number: Any = kinds[name](value)
            except ValueError:
                raise LabError(f"/set {name} {value!r}: must be a number") from None
            self.sampling = replace(self.sampling, **{name: number})
        elif name:
            raise LabError(f"/set {name}: unknown. {nearest(name, ['length', 'stop', *kinds])}")
        shown = {"length": self.length, "stop": self.stop, **{n: getattr(self.sampling, n) for n in kinds}}
        self.err.print(", ".join(f"{n.replace('_', '-')} {v!r}" for n, v in shown.items()))

    def _new(self, name: str) -> None:
        if name in self.sessions:
            raise LabError(f"session {name!r} exists already: /switch {name} goes there")

    def _read(self, text: str) -> None:
        tokens = self.session.encode(text)
        with reading(self.err, len(tokens)) as progress:

            def told(count: int) -> None:
                progress(count)
                if self._interrupted:
                    raise Interrupted

            self.session.read(tokens, told)

    def _remember(self, mark: Mark) -> None:
        kept = self.undo[self.name]
        kept.append(mark)
        most = max(1, UNDO_BYTES // max(1, states.nbytes(mark.state)))
        while len(kept) > most:
            kept.popleft()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Ctrl-C is noted, and acted on between two tokens or pieces, where the session is whole."""

        def note(_signal: int, _frame: FrameType | None) -> None:
            self._interrupted = True

        self._interrupted = False
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _whole(value: str, usage: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 0:
        raise LabError(f"{usage}: N must be a whole number from 0 on, not {value!r}")
    return number


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
