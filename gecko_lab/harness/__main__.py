"""``python -m gecko_lab.harness RUN --tasks NAME,... | --choice NAME=FILE``: benchmarks by lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from ..artifacts import add_device_argument, add_model_arguments, open_artifact
from ..cli import guarded
from ..errors import LabError
from ..run import write_atomic

TEXT = """Runs tasks of EleutherAI's lm-evaluation-harness on a trained model (pip install 'gecko-lab[harness]').

--tasks names tasks of the harness; those that come with it fetch their data, those of --include FOLDER (its YAML files)
may lie on this machine. --choice NAME=FILE makes one of a local .jsonl file with rows {query, choices, gold}."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.harness",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(p)
    p.add_argument("--tasks", default="", metavar="NAME,...", help="tasks or groups of the harness")
    p.add_argument("--include", type=Path, metavar="FOLDER", help="a folder with YAML files of further tasks")
    p.add_argument("--choice", action="append", default=[], metavar="NAME=FILE", help="multiple choice from a file")
    p.add_argument("--limit", type=int, metavar="N", help="examples of each task (default: all)")
    p.add_argument("--shots", type=int, metavar="N", help="solved examples before each question (default: the task's)")
    p.add_argument("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), help="as in training")
    add_device_argument(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    p.add_argument("--samples", type=Path, metavar="FILE", help="also write every question's answers, a JSON line each")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend."""
    options = parser().parse_args(arguments)
    return guarded(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from .adapter import HarnessModel, choice_task
    except ImportError as error:
        raise LabError(f"this needs lm-evaluation-harness: pip install 'gecko-lab[harness]' ({error})") from None
    from ..tasks import Subject

    names = [name for name in options.tasks.split(",") if name]
    files = []
    for entry in options.choice:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise LabError(f"--choice {entry}: write NAME=FILE")
        files.append(choice_task(name, file))
    if not names and not files:
        raise LabError("nothing to run: give --tasks NAME,... or --choice NAME=FILE")
    if options.include is not None and not options.include.is_dir():
        raise LabError(f"--include {options.include}: no such folder")
    for option, file in (("--json", options.json), ("--samples", options.samples)):
        if file is not None and not file.absolute().parent.is_dir():
            raise LabError(f"{option} {file}: the folder {file.absolute().parent} does not exist")
    include = None if options.include is None else str(options.include)
    manager = TaskManager(include_path=include, include_defaults=bool(names))  # reading its thousands takes seconds
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise LabError(f"--tasks: the harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists them")

    artifact = open_artifact(options.model, options.checkpoint)
    subject = Subject.of(artifact, options.device, options.precision)
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as bar:
        line = bar.add_task("requests")
        model = HarnessModel.of(subject).watched(lambda done, total: bar.update(line, completed=done, total=total))
        found: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=[*names, *files],
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=options.samples is not None,
        )
    _print(artifact.name, found["results"])
    if options.json is not None:
        kept = {"model": artifact.name, "precision": subject.precision, "results": found["results"]}
        write_atomic(options.json, json.dumps(kept, indent=2, default=str) + "\n")
    if options.samples is not None:
        lines = [{"task": task, **sample} for task, samples in found["samples"].items() for sample in samples]
        write_atomic(options.samples, "".join(json.dumps(line, default=str) + "\n" for line in lines))
    return 0


def _print(name: str, results: dict[str, dict[str, Any]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]model[/] {name}")
    table = Table("task", "measure", "value", "+-", box=None, pad_edge=False)
    for task, values in results.items():
        for key, value in values.items():
            measure, comma, kind = key.partition(",")
            if comma and isinstance(value, float | int) and not measure.endswith("_stderr"):
                error = values.get(f"{measure}_stderr,{kind}")
                label = measure if kind == "none" else f"{measure} ({kind})"
                table.add_row(task, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "-")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
