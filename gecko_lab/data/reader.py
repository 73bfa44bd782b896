"""Files to documents: folders, globs, plain or compressed, one document a file or a .jsonl row."""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import DataError

COMPRESSED = (".xz", ".gz", ".zst")
REPORT = 1 << 20


class SourceFile(NamedTuple):
    """A file, and its name in messages, splits and fingerprints (relative, so that moving a corpus changes nothing)."""

    path: Path
    name: str


class Raw(NamedTuple):
    """One document as it stands in its file: a whole file (line None) or one row of a .jsonl file."""

    path: str
    name: str
    line: int | None
    data: bytes

    @property
    def where(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


def is_jsonl(path: Path) -> bool:
    """Whether the file holds one document a line."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    return plain.suffix in (".jsonl", ".ndjson")


def find_files(spec: str) -> list[SourceFile]:
    """The files that a path, folder or glob names, sorted; hidden files of a folder are left out."""
    path = Path(spec)
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path)))
        if not found:
            raise DataError(f"{spec}: the folder holds no files")
        return [SourceFile(f, f.relative_to(path).as_posix()) for f in found]
    if glob.has_magic(spec):
        found = sorted(Path(f) for f in glob.glob(spec, recursive=True) if Path(f).is_file())
        if not found:
            raise DataError(f"{spec}: no file matches")
        base = os.path.dirname(spec[: next(i for i, c in enumerate(spec) if c in "*?[")])
        return [SourceFile(f, Path(os.path.relpath(f, base or ".")).as_posix()) for f in found]
    raise DataError(f"{spec}: no such file or folder")


def read_raw(file: SourceFile, progress: Callable[[int], None] = lambda size: None) -> Iterator[Raw]:
    """The documents of one file, in order, not yet checked; blank lines of a .jsonl file are no rows.

    ``progress`` is told how many more bytes of the file on disk were read.
    """
    path, told = str(file.path), 0
    try:
        with file.path.open("rb") as disk, _opened(disk, file.path) as stream:
            if not is_jsonl(file.path):
                yield Raw(path, file.name, None, stream.read())
            else:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield Raw(path, file.name, number, line)
                    if disk.tell() - told >= REPORT:
                        progress(disk.tell() - told)
                        told = disk.tell()
            progress(disk.tell() - told)
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated {file.path.suffix} file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def text_of(raw: Raw, field: str) -> bytes:
    """The UTF-8 text of a document (empty when it has none); DataError names file, line or byte offset."""
    if raw.line is None:
        return _checked(raw.data, raw.where)
    try:
        row: Any = json.loads(_checked(raw.data, raw.where))
    except json.JSONDecodeError as error:
        raise DataError(f"{raw.where}: not a JSON row ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        has = f"it has {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "the row is no object"
        raise DataError(
            f"{raw.where}: no text in field {field!r} ({has}); name the field (data.text_field, --text-field)"
        )
    try:
        return str(row[field]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{raw.where}: field {field!r} is not Unicode text at character {error.start}") from None


def _checked(data: bytes, where: str) -> bytes:
    nul = data.find(0)
    if nul >= 0:
        hint = "it looks like UTF-16; convert it to UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not text"
        raise DataError(
            f"{where}: binary file, NUL byte at byte offset {nul} ({hint}). A glob such as "
            "'FOLDER/**/*.txt' leaves such files out"
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 at byte offset {error.start} (byte 0x{data[error.start]:02x}); convert it to UTF-8"
        ) from None
    return data


def _opened(disk: BinaryIO, path: Path) -> Any:
    if path.suffix == ".xz":
        return lzma.open(disk)
    if path.suffix == ".gz":
        return gzip.open(disk)
    if path.suffix == ".zst":
        try:
            return io.BufferedReader(_Zst(disk, importlib.import_module("zstandard")), 1 << 20)
        except ImportError:
            raise DataError(f"{path}: reading .zst needs zstandard: pip install 'gecko-lab[data]'") from None
    return disk


class _Zst(io.RawIOBase):
    """All frames of a .zst file; the library's own reader ends after the first and takes a cut file for a whole one."""

    def __init__(self, disk: BinaryIO, library: Any) -> None:
        self._disk, self._library = disk, library
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._disk.read(1 << 20)
            if not block:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
