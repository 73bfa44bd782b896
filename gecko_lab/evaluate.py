"""``python -m gecko_lab.evaluate RUN [task=NAME field=value ...]``: what a trained model can do.

Without a task: how well it predicts a text, the more so the more it read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from .artifacts import Artifact, add_device_argument, add_model_arguments, open_artifact
from .cli import complain, guarded, written
from .errors import LabError
from .evaluation import evaluate
from .run import write_atomic
from .tasks import Subject, Task, configure, listing, run_task
from .tasks.runner import default_folder, write

TEXT = """Loss, perplexity and bits per byte of a trained model, and its loss by how much of the document it has read.

Without further options it repeats the run's own validation. With --stream every document is read from its beginning
to its end with the state carried, whatever its length, in memory that does not grow.

With task=NAME it runs one of the evaluations that --tasks lists, such as task=needle lengths=[1024,4096], prints a
table and writes results.json and figures to a folder."""
PLAIN = ("data", "split", "seq_len", "batches", "batch_size", "stream")  # options of the evaluation without a task
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.evaluate",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(p, optional=True)
    p.add_argument(
        "overrides", metavar="FIELD=VALUE", nargs="*", help="task=NAME and the task's fields, as --tasks lists them"
    )
    p.add_argument("--tasks", action="store_true", help="list the tasks with their fields")
    p.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where a task writes (default: a new one in RUN/evaluations)"
    )
    p.add_argument(
        "--data", metavar="DATA", help="stdlib, a text file, folder or glob, or a token store (default: the run's)"
    )
    p.add_argument(
        "--split",
        choices=("val", "train", "all"),
        help="part of the data (default: val, the part held out; all of a text given by --data)",
    )
    p.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens in a row, with --stream in a piece (default: the run's)"
    )
    p.add_argument(
        "--batches", type=int, metavar="N", help="batches, spread over the split; 0: all (default: the run's)"
    )
    p.add_argument("--batch-size", type=int, metavar="N", help="rows side by side (default: the run's)")
    p.add_argument("--stream", action="store_true", help="read whole documents, the state carried from piece to piece")
    p.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed", "bf16-true"),
        help="as in training (default: the run's; of an export bf16-mixed on a GPU, else 32-true)",
    )
    add_device_argument(p)
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend, or 130 when it was interrupted."""
    options = parser().parse_intermixed_args(arguments)
    if options.model is not None and "=" in str(options.model) and not options.model.exists():
        options.overrides.insert(0, str(options.model))  # no RUN was given
        options.model = None
    try:
        return guarded(lambda: _main(options))
    except KeyboardInterrupt:
        complain(LabError("interrupted"))
        return INTERRUPTED


def _main(options: argparse.Namespace) -> int:
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise LabError(f"--json {options.json}: the folder {options.json.absolute().parent} does not exist")
    if options.tasks or "task=help" in options.overrides:
        return _list_tasks()
    if options.overrides:
        return _task(options)
    if options.out is not None:
        raise LabError(f"--out {options.out}: only a task writes a folder; add task=NAME, or use --json FILE")
    if options.model is None:
        raise LabError("which model? Give RUN: a run folder, a .ckpt file or an exported folder")
    artifact = open_artifact(options.model, options.checkpoint)
    err = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as bar:
        task = bar.add_task("reading")
        results = evaluate(
            artifact,
            options.data,
            options.split,
            seq_len=options.seq_len,
            batches=options.batches,
            batch_size=options.batch_size,
            stream=options.stream,
            device=options.device,
            precision=options.precision,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    notes = [f"note: {note}" for note in artifact.notes]
    trained, now = results["trained_on_fingerprint"], results["data_fingerprint"]
    if options.data is None and trained is not None and trained != now:
        notes.append(
            f"warning: the data changed since the run: fingerprint {trained[:12]} then, {now[:12]} now; "
            "these numbers do not compare with the run's own"
        )
    for note in notes:
        err.print(note, markup=False)
    _print(artifact, results)
    if options.json is not None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()}
        try:
            write_atomic(options.json, json.dumps({**finite, "notes": notes}, indent=2) + "\n")
        except OSError as error:
            raise LabError(f"--json {options.json}: {error.strerror}") from None
    return 0


def _task(options: argparse.Namespace) -> int:
    """Run one task: everything that can be checked is checked before the model is read."""
    task = configure(options.overrides)
    for name in PLAIN:
        if getattr(options, name) not in (None, False):
            raise LabError(
                f"--{name.replace('_', '-')} is for the evaluation without a task; a task has fields (--tasks)"
            )
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise LabError(f"--out {options.out}: is a file; give a folder")
    if options.model is None and task.needs_model:
        raise LabError(
            f"task={task.config.name}: which model? Give RUN: a run folder, a .ckpt file or an exported folder"
        )
    err, subject = Console(stderr=True, soft_wrap=True, highlight=False), None
    if options.model is not None:
        artifact = open_artifact(options.model, options.checkpoint)
        for note in artifact.notes:
            err.print(f"note: {note}", markup=False)
        subject = Subject.of(artifact, options.device, options.precision)
    with Progress(*Progress.get_default_columns(), console=err, transient=True, disable=not err.is_terminal) as bar:
        line = bar.add_task(task.config.name)
        results = run_task(task, subject, lambda done, total: bar.update(line, completed=done, total=total))
    files = write(task, results, options.out or default_folder(task, subject))
    if options.json is not None:
        write_atomic(options.json, files[0].read_text())
    _print_task(task, results, files)
    return 0


def _print_task(task: Task, results: dict[str, Any], files: list[Path]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    model, facts = results["model"], {}
    if model is not None:
        step = "" if model["step"] is None else f", step {model['step']:,}"
        facts["model"] = f"{model['family']}, {model['parameters']:,} parameters: {model['file']}{step}"
    took = f"{results['seconds']:.1f} s on {results['device']}" + (f" ({model['precision']})" if model else "")
    facts |= {**task.summary(results), "took": took, "files": ", ".join([str(files[0]), *(f.name for f in files[1:])])}
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        console.print(f"[bold]{name:{width}}[/] {escape(value)}")
    for sheet in task.tables(results):
        table = Table(title=escape(sheet.title), title_justify="left", box=None, pad_edge=False)
        for column in sheet.columns:
            words = any(isinstance(row.get(column.key), str) for row in sheet.rows)
            table.add_column(escape(column.title), no_wrap=True, justify="left" if words else "right")
        for row in sheet.rows:
            table.add_row(*(escape(column.show(row)) for column in sheet.columns))
        console.print("")
        whole = console.measure(table, options=console.options.update(max_width=1000)).maximum
        Console(highlight=False, width=max(console.width, whole)).print(table)  # numbers are not for folding


def _list_tasks() -> int:
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    console.print("python -m gecko_lab.evaluate RUN task=NAME field=value ...\n", markup=False)
    for name, text, known in listing():
        table = Table(title=f"[bold]{name}[/]: {escape(text)}", title_justify="left", box=None, pad_edge=False)
        for heading in ("field", "default", "meaning"):
            table.add_column(heading)
        for field, default, meaning in known:
            table.add_row(f"  {field}", escape(written(default)), escape(meaning))
        console.print(table)
        console.print("")
    return 0


def _print(artifact: Artifact, results: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    how = f"{'pieces' if results['stream'] else 'rows'} of {results['seq_len']:,} tokens"
    how += ", state carried" if results["stream"] else ""
    model = artifact.model
    facts = {
        "model": f"{model.config.family}, {model.num_parameters():,} parameters: {artifact.name}",
        "data": f"{results['data']}, {results['split']}: {results['documents']:,} documents; {how}",
        "read": f"{results['tokens']:,} tokens, {results['bytes']:,} bytes of text, "
        f"{results['tokens_per_second']:,.0f} tokens a second on {results['device']} ({results['precision']})",
        "loss": f"{results['loss']:.4f} nats a token, perplexity {results['perplexity']:.2f}, "
        f"{results['bits_per_byte']:.4f} bits per byte",
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:6}[/] {escape(value)}", highlight=False)
    console.print()
    curve = Table(
        "position",
        "loss",
        "of tokens",
        title="Loss by position in the document",
        box=None,
        title_justify="left",
        pad_edge=False,
    )
    for column in curve.columns:
        column.justify = "right"
    for row in results["by_position"]:
        span = f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} - {row['to']:,}"
        curve.add_row(span, f"{row['loss']:.4f}", f"{row['tokens']:,}")
    console.print(curve)


if __name__ == "__main__":
    sys.exit(main())
