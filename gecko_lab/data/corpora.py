"""Corpora read into memory, with a part held out for validation."""

from __future__ import annotations

import hashlib
import logging
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

from .errors import DataError
from .reader import find_files, is_jsonl, read_raw, text_of
from .source import TokenSource, encode_documents
from .tokenizers import Tokenizer

log = logging.getLogger(__name__)

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Split(NamedTuple):
    """What is trained on, what is held out (None: nothing), and how many documents were empty."""

    train: TokenSource
    val: TokenSource | None
    skipped: int = 0


def held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is validation: its hash decides, so other documents do not matter."""
    return _position(name) < fraction


def stdlib(tokenizer: Tokenizer, val_fraction: float | None = None) -> Split:
    """The running Python's own library without its tests, one file a document, split by the path's hash."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    texts = []
    for file in sorted(files):
        text = file.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding on purpose
        if text:
            texts.append((file.relative_to(root).as_posix(), text))
    if not texts:
        raise DataError(f"this Python has no library sources under {root}: use data=text data.path=...")
    return _by_name(texts, tokenizer, 0.05 if val_fraction is None else val_fraction)


def text(path: str, tokenizer: Tokenizer, field: str, val_fraction: float | None, hold_out: bool = True) -> Split:
    """Documents of a file, folder or glob.

    Several files are split by their names; of one file the end is held out: its last rows (.jsonl), or its last
    bytes, cut at a character.
    """
    files = find_files(path)
    texts, skipped = [], 0
    for file in files:
        for raw in read_raw(file):
            content = text_of(raw, field)
            if content:
                texts.append((file.name, content))
            else:
                skipped += 1
    if not texts:
        raise DataError(f"{path}: empty, no text in {len(files)} file(s)")
    if skipped:
        log.warning("%s: %d empty document(s) skipped", path, skipped)
    if not hold_out:
        return Split(encode_documents(texts, tokenizer), None, skipped)
    if len(files) > 1:
        return _by_name(texts, tokenizer, 0.05 if val_fraction is None else val_fraction, skipped)
    fraction = 0.1 if val_fraction is None else val_fraction
    train, val = _tail(texts, fraction, rows=is_jsonl(files[0].path))
    if not train or not val:
        raise DataError(f"{path}: too little text to hold out {fraction:.0%} for validation; give data.val_path")
    return Split(encode_documents(train, tokenizer), encode_documents(val, tokenizer), skipped)


Texts = list[tuple[str, bytes]]


def _by_name(texts: Texts, tokenizer: Tokenizer, fraction: float, skipped: int = 0) -> Split:
    names = {name for name, _ in texts}  # all rows of a .jsonl file go the same way
    if len(names) < 2:
        raise DataError(f"one file with text ({next(iter(names))}): too little to hold out files; give data.val_path")
    out = {name for name in names if held_out(name, fraction)} or {min(names, key=_position)}
    if out == names:
        out.remove(max(names, key=_position))
    train = [t for t in texts if t[0] not in out]
    val = [t for t in texts if t[0] in out]
    return Split(encode_documents(train, tokenizer), encode_documents(val, tokenizer), skipped)


def _tail(texts: Texts, fraction: float, rows: bool) -> tuple[Texts, Texts]:
    if rows:
        count = int(len(texts) * fraction)
        return texts[: len(texts) - count], texts[len(texts) - count :]
    (name, content), *_ = texts
    cut = len(content) - int(len(content) * fraction)
    while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    head, tail = content[:cut], content[cut:]
    return ([(name, head)] if head else []), ([(name, tail)] if tail else [])


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
