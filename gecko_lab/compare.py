"""``python -m gecko_lab.compare STUDY_OR_RUNS...``: runs side by side in TensorBoard, named so that they sort."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from .cli import guarded
from .errors import LabError

TEXT = """Arranges runs as links below one folder, so that TensorBoard lists them in a useful order, and prints the
command.

A study becomes NN_ARM/seed_SS, the baseline first; the trials of a search become RANK_trial_NNN. Runs that are still
going stay live.
In TensorBoard HPARAMS has the options that differ beside the metrics, CUSTOM SCALARS a page of charts a theme."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.compare",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "sources", metavar="STUDY_OR_RUNS", nargs="+", type=Path, help="folder of a study, a run or many runs"
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the links (default: STUDY/compare, else a temporary one)",
    )
    p.add_argument("--open", action="store_true", help="start TensorBoard on this machine and stay until Ctrl-C")
    p.add_argument("--port", type=int, default=6006, metavar="N", help="of TensorBoard (default: 6006)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend."""
    options = parser().parse_args(arguments)
    return guarded(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    found = [named_runs(source) for source in options.sources]
    if len(found) == 1:
        runs = found[0]
    else:
        runs = {}
        for source, part in zip(options.sources, found, strict=True):
            title = source.absolute().name
            alone = list(part) == [title]
            for name, folder in part.items():
                runs[_free(title if alone else f"{title}/{name}", runs)] = folder
    only = options.sources[0]
    default = (
        only / "compare" if len(found) == 1 and _is_study(only) else Path(tempfile.mkdtemp(prefix="gecko_compare_"))
    )
    out = options.out or default
    arrange(runs, out)
    differ = tabulate(runs.values(), out)
    command = ["tensorboard", "--logdir", str(out), "--port", str(options.port)]
    console = Console(soft_wrap=True, highlight=False)
    for name in runs:
        console.print(name, markup=False)
    if len(runs) > 1:
        console.print(f"They differ in {', '.join(differ) or 'nothing'}.", markup=False)
    console.print(f"{len(runs)} runs: {shlex.join(command)}", markup=False)
    if options.open:
        try:
            return subprocess.run([sys.executable, "-m", "tensorboard.main", *command[1:]]).returncode
        except KeyboardInterrupt:
            return 0
    return 0


def named_runs(source: Path) -> dict[str, Path]:
    """Name to show -> run folder, in order; LabError when there is no run with event files."""
    if not source.is_dir():
        raise LabError(f"{source}: no such folder; give a study (studies/NAME), a run, or a folder of runs")
    runs = _of_study(source) if _is_study(source) else _of_folder(source)
    kept = {name: path for name, path in runs.items() if (path / "tensorboard").is_dir()}
    if not kept:
        raise LabError(f"{source}: holds no run that TensorBoard could show (none has a folder tensorboard/)")
    return kept


def arrange(runs: dict[str, Path], out: Path) -> None:
    """Make ``out`` a folder of links to the runs' event files; replaces only what an earlier call left there."""
    marker = out / ".gecko_compare"
    if out.exists() and not out.is_dir():
        raise LabError(f"--out {out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not marker.exists():
        raise LabError(f"--out {out}: is not empty and was not made by this command; choose another folder")
    if marker.exists():
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for name, path in runs.items():
            link = out / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath((path / "tensorboard").resolve(), link.parent.resolve()))
    except OSError as error:
        raise LabError(f"--out {out}: {error.strerror}") from error


def tabulate(runs: Iterable[Path], out: Path) -> list[str]:
    """Give HPARAMS its columns: the options in which the runs differ, whose names are returned, and the metrics of
    validation."""
    from omegaconf import OmegaConf

    from .studies.records import read_history
    from .telemetry.layout import flat, write_columns

    options, metrics = [], dict.fromkeys(("val/loss", "val/bits_per_byte"))
    for run in runs:
        content = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        options.append(flat(content))
        for line in read_history(run / "metrics.jsonl"):
            metrics |= dict.fromkeys(key for key in line if key.startswith("val/"))
    return write_columns(out, options, list(metrics))


def _is_study(folder: Path) -> bool:
    return (folder / "study.json").is_file() or (folder / "journal.log").is_file()


def _of_study(folder: Path) -> dict[str, Path]:
    from .studies.analysis import ranked
    from .studies.records import load_study

    record = load_study(folder)
    trials = [t for t in record.trials if t.stage == "main" and not t.retried]
    runs: dict[str, Path] = {}
    if record.kind == "search":
        done = ranked((t for t in trials if t.state == "complete"), record.direction)
        others = [t for t in trials if t.state != "complete"]
        for i, t in enumerate([*done, *others]):
            rank = f"{i + 1:03}" if t.state == "complete" else t.state
            arm = f"_{_safe(t.arm)}" if len(record.arms) > 1 else ""
            runs[f"{rank}{arm}_trial_{t.number:03}"] = t.run_dir
        return runs
    names = sorted((a.name for a in record.arms), key=lambda name: name != "baseline")
    for t in sorted(trials, key=lambda t: (names.index(t.arm), t.seed, t.number)):
        state = "" if t.state == "complete" else f"_{t.state}"
        runs[_free(f"{names.index(t.arm):02}_{_safe(t.arm)}/seed_{t.seed:02}{state}", runs)] = t.run_dir
    return runs


def _of_folder(folder: Path) -> dict[str, Path]:
    """The folder itself when it is a run, else the runs at any depth below it, by their path."""
    if (folder / "config.yaml").is_file():
        return {folder.absolute().name: folder}
    return {"/".join(p.parent.relative_to(folder).parts): p.parent for p in sorted(_configs(folder))}


def _configs(folder: Path) -> Iterable[Path]:
    return (p for p in folder.rglob("config.yaml") if ".hydra" not in p.parts)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name)


def _free(name: str, taken: dict[str, Path]) -> str:
    """The name, with a number where it is taken."""
    count, free = 2, name
    while free in taken:
        count, free = count + 1, f"{name}_{count}"
    return free


if __name__ == "__main__":
    sys.exit(main())
