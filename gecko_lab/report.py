"""``python -m gecko_lab.report STUDY``: what a study found, as a page, a summary and tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from .cli import guarded
from .errors import LabError
from .run import write_atomic

if TYPE_CHECKING:
    from .studies.analysis import Analysis

TEXT = """Writes report.html (one page that needs no server), report.md with figures/*.svg, arms.csv, trials.csv
and STUDY.yaml, which repeats the study.

A study that is still running gives a partial report that says what is missing."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.report",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", metavar="STUDY", help="a study's folder (studies/NAME), a journal file or a database URL")
    p.add_argument("--name", metavar="NAME", help="the study in a storage that holds several")
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the report (default: report/ in the study's folder)"
    )
    p.add_argument("--baseline", metavar="ARM", help="the arm to compare with (default: the study's first)")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend."""
    options = parser().parse_args(arguments)
    return guarded(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    from .studies.analysis import analyse
    from .studies.records import load_study

    if "://" not in options.study and not Path(options.study).exists():
        raise LabError(
            f"{options.study}: no such study; give the folder that gecko_lab.sweep named, such as studies/components"
        )
    record = load_study(options.study, options.name)
    analysis = analyse(record, options.baseline)
    out = options.out or record.folder / "report"
    write(analysis, out)
    console = Console(soft_wrap=True, highlight=False)
    console.print(analysis.answer, markup=False)
    for text in (*analysis.warnings, *analysis.missing):
        console.print(f"note: {text}", markup=False)
    console.print(f"report: {out / 'report.html'}", markup=False)
    return 0


def write(analysis: Analysis, out: Path) -> None:
    """Put the files of a report into ``out``, over an earlier report's; LabError when it cannot be written."""
    from .studies import exhibits, page, summary, svg

    files = {
        "report.html": page.page(analysis),
        "report.md": summary.markdown(analysis, "figures"),
        "arms.csv": summary.arms_csv(analysis),
        "trials.csv": summary.trials_csv(analysis.record),
        f"{analysis.record.name}.yaml": yaml.safe_dump(analysis.record.sweep, sort_keys=False, allow_unicode=True),
    }
    files |= {f"figures/{f.slug}.svg": svg.standalone(f.svg) for f in exhibits.figure_set(analysis)}
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(out / name, text)
    except OSError as error:
        raise LabError(f"--out {out}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
