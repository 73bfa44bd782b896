"""Where a study is kept: a journal file in the study's folder, or any database that SQLAlchemy reaches."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from ..errors import LabError

JOURNAL = "journal.log"
optuna.logging.set_verbosity(optuna.logging.ERROR)


class FileLock:
    """The kernel's lock on FILE.lock: it ends with its holder, so that a killed worker leaves nothing behind.

    Its next holder cuts off the half line that a worker killed while writing left at the journal's end.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.thread = threading.Lock()
        self.file: IO[str] | None = None

    def acquire(self) -> bool:
        self.thread.acquire()
        try:
            self.file = self.journal.with_suffix(".lock").open("a")
            fcntl.flock(self.file, fcntl.LOCK_EX)
            _cut_half_line(self.journal)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        self.thread.release()


def _cut_half_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep and (file.seek(keep - 1), file.read(1))[1] != b"\n":
            keep -= 1
        if keep != end:
            file.truncate(keep)


def open_storage(where: str | Path, *, create: bool = False) -> BaseStorage:
    """The storage at a URL (``sqlite:///FILE``, ``postgresql+psycopg://...``), a journal file or a study's folder.

    Raises LabError when it cannot be reached, is no storage, or does not exist and ``create`` is false.
    """
    text = str(where)
    try:
        if "://" in text:
            return _database(text)
        return _journal(Path(text), create)
    except LabError:
        raise
    except Exception as error:  # the drivers have no common ancestor
        raise LabError(f"storage={redacted(text)}: cannot be opened: {_first_line(error)}") from error


def _database(url: str) -> BaseStorage:
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise LabError(f"storage={redacted(url)}: its driver is not installed ({error})") from error


def _journal(path: Path, create: bool) -> BaseStorage:
    file = path if path.suffix == ".log" else path / JOURNAL
    if not file.exists():
        if not create:
            raise LabError(f"{path}: no study here (no {JOURNAL}); give the folder of a study or its storage's URL")
        file.parent.mkdir(parents=True, exist_ok=True)
    elif file.is_dir() or file.read_bytes()[:1] not in (b"", b"{"):
        raise LabError(f"{file}: is no journal of a study")
    return JournalStorage(JournalFileBackend(str(file), lock_obj=FileLock(file)))  # type: ignore[arg-type]  # acquire and release


def redacted(url: str) -> str:
    """The URL without its password."""
    with contextlib.suppress(Exception):
        from sqlalchemy.engine import make_url

        if "://" in url:
            return make_url(url).render_as_string(hide_password=True)
    return url


def _first_line(error: Any) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
