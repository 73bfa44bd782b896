"""Run a task and keep what came out: results.json and the figures, in one folder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from ..artifacts import sha256
from ..errors import RunError
from ..run import environment, write_atomic
from ..studies.svg import standalone
from ..telemetry.peak import device_label
from .base import Progress, Task, nothing
from .subject import Subject


def run_task(task: Task, subject: Subject | None, progress: Progress = nothing) -> dict[str, Any]:
    """Check, run, and describe: the task's own results with what is needed to read and repeat them beside them.

    Keys added: task, config, model, precision, device, seconds, peak_memory_bytes (of a CUDA device), environment.
    """
    task.check(subject)  # type: ignore[arg-type]  # a task without needs_model takes None
    where = subject.device if subject is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    began = time.perf_counter()
    results = task.run(subject, progress)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    config = dataclasses.asdict(task.config)
    return plain(
        {
            "task": config.pop("name"),
            "config": config,
            "model": None if subject is None else describe(subject),
            "device": device_label(where),
            "seconds": seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
            **results,
            "environment": environment(),
        }
    )


def describe(subject: Subject) -> dict[str, Any]:
    """Which model it was."""
    config, artifact = subject.model.config, subject.artifact
    return {
        "file": None if artifact is None else str(artifact.file),
        "sha256": None if artifact is None or not artifact.file.is_file() else sha256(artifact.file),
        "step": None if artifact is None else artifact.step,
        "trained_on_rows_of": None if artifact is None else artifact.seq_len,
        "family": config.family,
        "parameters": subject.model.num_parameters(),
        "window": subject.window,
        "tokenizer": subject.tokenizer.name,
        "precision": subject.precision,
    }


def write(task: Task, results: dict[str, Any], folder: Path) -> list[Path]:
    """results.json and every figure into ``folder``, which is made; the files' paths."""
    files = {"results.json": json.dumps(results, indent=1, allow_nan=False) + "\n"}
    files |= {f"{name}.svg": standalone(svg) + "\n" for name, svg in task.figures(results).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(folder / name, text)
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}") from None
    return [folder / name for name in files]


def default_folder(task: Task, subject: Subject | None) -> Path:
    """RUN/evaluations/TASK-TIME, or evaluations/TASK-TIME here for a model that does not lie in a run folder."""
    run = None if subject is None or subject.artifact is None else subject.artifact.run
    name = re.sub(r"\W+", "-", task.config.name) + time.strftime("-%Y%m%d-%H%M%S")
    return (run or Path()) / "evaluations" / name


def plain(value: Any) -> Any:
    """JSON's own types: tuples and arrays as lists, numpy's numbers as Python's, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
