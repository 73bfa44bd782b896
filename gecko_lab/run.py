"""The run folder: one process writes it, a run is never overwritten, and it says how it was made.

    runs/NAME/config.yaml        the resolved configuration
             environment.json    command line, versions, git commit, device, kernel backend, data
             checkpoints/        step-00000100.ckpt, best.ckpt
             tensorboard/        event files
             metrics.jsonl       the same numbers for scripts
             sample.txt          what the model wrote at the end
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from .errors import RunError

PACKAGES = (
    "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "optuna",
    "tensorboard", "numpy", "cuda-bindings",
)

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES}


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new one, never half of it."""
    payload = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises into a RunError that says what is left."""
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread, and raises there and again here: once is enough."""
        if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in DISK_ERRORS):
            before(failure)

    threading.excepthook = hook
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{path}: {os.strerror(error.errno)}" + (f" ({error.filename})" if error.filename else "")
        raise RunError(f"{where}. Checkpoints are untouched: make room, then continue with resume=auto") from error
    finally:
        threading.excepthook = before


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def holds_run(self) -> bool:
        return self.config_file.exists()

    def began(self) -> bool:
        """Whether a run was ever started here, be it that it was killed before it wrote its configuration."""
        return self.holds_run() or (self.path / "lock").exists()

    def check_free(self, resume: str | None) -> None:
        """Raise RunError when the folder cannot take this run; nothing is written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"hydra.run.dir={self.path}: is a file; give a folder")
        if self.holds_run() and resume is None:
            raise RunError(
                f"{self.path} already holds a run and is not overwritten: continue it with resume=auto, "
                "or choose another folder with hydra.run.dir=..."
            )
        if resume == "auto" and not self.began():
            raise RunError(f"resume=auto: {self.path} holds no run; name the run's folder with hydra.run.dir=...")
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK):
            raise RunError(f"hydra.run.dir={self.path}: {existing} is not writable")

    def claim(self) -> None:
        """Make the folder and hold its lock until the process ends; RunError when another process holds it."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
        except OSError as error:
            raise RunError(f"hydra.run.dir={self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{self.path}: another process is running in this folder") from error
        os.register_at_fork(after_in_child=self._lock.close)  # a data worker that outlives a kill must not hold it

    def release(self) -> None:
        """Let another process in; happens by itself when this one ends."""
        if self._lock is not None and not self._lock.closed:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()

    def changed(self, config_yaml: str) -> list[str]:
        """Settings in which a resumed run differs from the one that began here, as ``name: before -> now``."""
        if not config_yaml or not self.holds_run():
            return []
        before, now = (_leaves(OmegaConf.create(text)) for text in (self.config_file.read_text(), config_yaml))
        names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
        return [f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if n != "resume"]

    def record(self, config_yaml: str, environment: dict[str, Any]) -> None:
        """Put the resolved configuration and the environment beside the outputs; a resumed run keeps its history."""
        if not self.holds_run():
            write_atomic(self.config_file, config_yaml)
        history: list[Any] = []
        file = self.path / "environment.json"
        if file.exists():
            with contextlib.suppress(ValueError):
                history = json.loads(file.read_text())
        write_atomic(file, json.dumps([*history, environment], indent=2) + "\n")


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not OmegaConf.is_dict(node):
        return {prefix[:-1]: node}
    return {k: v for key, value in node.items() for k, v in _leaves(value, f"{prefix}{key}.").items()}


def environment(**extra: Any) -> dict[str, Any]:
    """What a reader needs to repeat the run on another machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.orig_argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": git_commit(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu,
        **extra,
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package lies in, marked when it has changes; None outside one."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10)
        tracked = run("ls-files", "--error-unmatch", Path(__file__).name)
        if tracked.returncode:
            return None
        dirty = "-dirty" if run("status", "--porcelain").stdout.strip() else ""
        return run("rev-parse", "HEAD").stdout.strip() + dirty
    except (OSError, subprocess.TimeoutExpired):
        return None
