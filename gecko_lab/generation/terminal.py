"""What the commands share when they print: a progress bar for reading, and text that cannot run the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .reading import PIECE

CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def clean(text: str) -> str:
    """On a terminal without control characters: a young model's escape sequences must not run it."""
    return text.translate(CONTROL) if sys.stdout.isatty() else text


@contextlib.contextmanager
def reading(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for a prompt of more than one piece; shorter ones have none."""
    bar = Progress(
        TextColumn("reading"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=total <= PIECE or not console.is_terminal,
    )
    task = bar.add_task("reading", total=total)
    with bar:
        yield lambda count: bar.advance(task, count)
