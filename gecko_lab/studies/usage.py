"""What ``python -m gecko_lab.sweep --help`` says."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from .sweepfile import read, shipped


def usage(launch: Any, editable: tuple[str, ...], nested: tuple[str, ...]) -> None:
    """Print shipped sweeps and every option."""
    console = Console(highlight=False)
    console.print("python -m gecko_lab.sweep NAME|FILE.yaml [OPTION=VALUE] [FIELD=VALUE]", markup=False)
    console.print("Runs many trials that answer one question; the same command again goes on (docs/studies.md).\n")
    sweeps = Table("sweep", "question", box=None, pad_edge=False)
    for name in shipped():
        sweeps.add_row(name, read(name)[1].get("question", ""))
    console.print(sweeps, "")
    options = Table("option", "default", box=None, pad_edge=False)
    for item in dataclasses.fields(launch):
        options.add_row(item.name, str(item.default))
    console.print(options, "")
    console.print("fields of the sweep: arms, " + ", ".join(editable) + ", " + ", ".join(f"{n}.X" for n in nested))
    console.print("overrides of the runs: FIELD=VALUE for all trials, FIELD=A,B or FIELD=interval(A,B) for the space")
