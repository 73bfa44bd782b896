"""What the commands share: mistakes end with a message and exit code 2, and --help prints every field."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import LabError

USER_ERROR = 2


def guarded(function: Callable[[], int]) -> int:
    """Run a command; a LabError becomes its message on standard error and exit code 2."""
    try:
        return function()
    except LabError as error:
        complain(error)
        return USER_ERROR


def complain(error: Exception) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)


def print_help(module: str, text: str, root: Any, options: dict[str, list[str]]) -> None:
    """Every group with its options, then every field with its default and its help."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(f"[bold]python -m {module}[/] \\[GROUP=OPTION] \\[FIELD=VALUE] \\[+ablation=NAME] ...\n\n{text}\n")
    groups = Table("group", "options", title="Choose a group", title_justify="left", box=None, pad_edge=False)
    for group, names in options.items():
        groups.add_row(("+" if group in ("ablation", "experiment") else "") + group, ", ".join(names))
    console.print(groups, "")
    table = Table("field", "default", "meaning", title="Set a field", title_justify="left", box=None, pad_edge=False)
    for name, default, meaning in fields(root):
        table.add_row(name, escape(written(default)), escape(meaning))
    console.print(table)


def written(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, list):
        return f"[{','.join(written(v) for v in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def fields(config: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, default, help) of every leaf field of a configuration dataclass."""
    found = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            found += fields(value, f"{name}.")
        else:
            found.append((name, "required" if value == MISSING else value, item.metadata.get("help", "")))
    return found
