"""Checkpoints that survive a kill at any moment: written beside, synced, renamed; checked when read.

A checkpoint is a file ``step-00000100.ckpt`` of torch's format followed by a 72-byte trailer (magic and sha256 of all
before it), so a truncated or flipped file is known from itself. Reading is ``weights_only``: nothing executes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

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
    """Read and verify; raises DamagedCheckpoint, or RunError when there is no such file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    body, trailer = data[:-TRAILER], data[-TRAILER:]
    if not trailer.startswith(MAGIC):
        raise DamagedCheckpoint(f"{path}: truncated, or not a checkpoint of gecko_lab")
    if hashlib.sha256(body).hexdigest().encode() != trailer[len(MAGIC) :]:
        raise DamagedCheckpoint(f"{path}: its checksum does not match: the file was changed or damaged")
    return torch.load(io.BytesIO(body), map_location=map_location, weights_only=True)  # type: ignore[no-any-return]


def steps(folder: Path) -> list[Path]:
    """The step checkpoints of a run, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def latest_good(folder: Path) -> Path:
    """The newest checkpoint that reads back whole; damaged ones are reported and passed over."""
    candidates = steps(folder)
    for path in candidates:
        try:
            load(path)
        except DamagedCheckpoint as error:
            log.warning("%s; using the one before it", error)
            continue
        return path
    if candidates:
        raise RunError(f"{folder}: none of its {len(candidates)} checkpoints can be read")
    raise RunError(f"{folder}: no checkpoint yet")


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's door to the functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path), map_location or "cpu")
