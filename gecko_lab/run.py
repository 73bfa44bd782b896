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
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import torch

from .errors import RunError

PACKAGES = ("torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "optuna", "tensorboard", "numpy", "cuda-bindings")


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

    def check_free(self, resume: str | None) -> None:
        """Raise RunError when the folder cannot take this run; nothing is written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"hydra.run.dir={self.path}: is a file; give a folder")
        if self.holds_run() and resume is None:
            raise RunError(
                f"{self.path} already holds a run and is not overwritten: continue it with resume=auto, "
                "or choose another folder with hydra.run.dir=..."
            )
        if resume == "auto" and not self.holds_run():
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
            self._lock = (self.path / "lock").open("w")
        except OSError as error:
            raise RunError(f"hydra.run.dir={self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{self.path}: another process is running in this folder") from error

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
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10)  # noqa: E731
        tracked = run("ls-files", "--error-unmatch", Path(__file__).name)
        if tracked.returncode:
            return None
        dirty = "-dirty" if run("status", "--porcelain").stdout.strip() else ""
        return run("rev-parse", "HEAD").stdout.strip() + dirty
    except (OSError, subprocess.TimeoutExpired):
        return None
