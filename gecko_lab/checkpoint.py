"""Checkpoints that survive a kill at any moment: written beside, synced, renamed; checked when read.

A checkpoint is a file ``step-00000100.ckpt`` of torch's format followed by a 72-byte trailer (magic and sha256 of all
before it), so a truncated or flipped file is known from itself. Reading is ``weights_only``: nothing executes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from .errors import RunError

log = logging.getLogger(__name__)
MAGIC = b"geckolab"
TRAILER = len(MAGIC) + 64


class DamagedCheckpoint(RunError):
    """The file is not what was written: truncated, changed, or no checkpoint at all."""


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write atomically. Raises RunError when the disk is full or the folder unwritable; older files stay."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    except OSError as error:
        raise RunError(f"cannot write a checkpoint to {path.parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w+b") as file:
            torch.save(checkpoint, file)
            file.flush()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0, os.SEEK_END)
            file.write(MAGIC + digest.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its own
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise RunError(f"cannot write the checkpoint {path}: {error}. Earlier checkpoints are untouched.") from error
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read and verify; raises DamagedCheckpoint, or RunError when there is no such file or it holds code."""
    try:
        with path.open("rb") as file:
            _verify(path, file)
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: holds more than tensors and plain values; nothing of it was executed") from error


def _verify(path: Path, file: IO[bytes]) -> None:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - TRAILER))
    trailer = file.read()
    if not trailer.startswith(MAGIC) or len(trailer) != TRAILER:
        raise DamagedCheckpoint(f"{path}: truncated, or not a checkpoint of gecko_lab")
    digest, left = hashlib.sha256(), size - TRAILER
    file.seek(0)
    while left:
        block = file.read(min(left, 1 << 22))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != trailer[len(MAGIC) :]:
        raise DamagedCheckpoint(f"{path}: its checksum does not match: the file was changed or damaged")


def steps(folder: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that reads back whole, and what it holds; damaged ones are reported and passed over, and
    best.ckpt is the last resort. None when the run has saved nothing yet."""
    candidates = [*steps(folder), *folder.glob("best.ckpt")]
    for path in candidates:
        try:
            return path, load(path)
        except DamagedCheckpoint as error:
            log.warning("%s; using the one before it", error)
    if candidates:
        raise RunError(f"{folder}: none of its {len(candidates)} checkpoints can be read; they are left as they are")
    return None


def rotate(folder: Path, keep: int) -> None:
    """Drop the oldest step checkpoints beyond ``keep``; the newest, which was written and synced just now, stays."""
    for old in steps(folder)[max(1, keep) :]:
        old.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """``target`` becomes the same file as ``source``, atomically and without a copy where the disk has links."""
    temporary = target.with_name(f".writing-{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def tidy(folder: Path, step: int) -> list[Path]:
    """Before a run goes on from ``step``: remove what a kill left half written, and set the step checkpoints after
    ``step`` aside (.old), so that none of them is taken for this run's own later. Returns those set aside."""
    for half in folder.glob(".writing-*"):
        half.unlink(missing_ok=True)
    later = [path for path in steps(folder) if int(path.stem.removeprefix("step-")) > step]
    for path in later:
        path.replace(path.with_name(path.name + ".old"))
    return later


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's door to the functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path), map_location or "cpu")
