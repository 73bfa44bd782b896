"""What a task is: a configuration, a check, a run that returns plain values, and how these are shown.

A file of this package registers ``class Mine(Task)`` with ``@TASKS.register("name")``. It gives

- ``Config``, a nested dataclass whose ``name`` defaults to the registered name (its help is the task's sentence in the
  list) and whose other fields are ``option(default, help)``
- ``check(subject)``: raise LabError before anything is read
- ``run(subject, progress)``: ``{"rows": [{...}, ...], ...}``, JSON-able, the same for the same seed
- ``columns`` or ``tables(results)`` for the printed table, ``figures(results)`` for the SVG files
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from ..components.registry import Registry
from .subject import Subject

TASKS = Registry("task")
Progress = Callable[[int, int], None]  # (done, total) in whatever unit the task counts


def nothing(done: int, total: int) -> None:
    """A progress that nobody watches."""


class Column(NamedTuple):
    """A column of a printed table: the rows' key, its heading, and the format of its values."""

    key: str
    title: str
    form: str = ""

    def show(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


class Sheet(NamedTuple):
    """A table: title, columns, rows (plain dicts)."""

    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]


class Task:
    """One evaluation of one trained model. See the module's text for what a subclass gives."""

    Config: ClassVar[Any]
    columns: ClassVar[tuple[Column, ...]] = ()
    needs_model = True  # False: RUN may be left out and ``subject`` is then None (a task that trains its own model)

    def __init__(self, config: Any) -> None:
        """Checks what needs no model: LabError for impossible values."""
        self.config = config

    def check(self, subject: Subject) -> None:
        """Raise LabError for what this model or these data cannot do; called before ``run``, may keep what it read."""

    def run(self, subject: Subject, progress: Progress = nothing) -> dict[str, Any]:
        """The numbers, as plain values: ``rows`` is a list of dicts, whatever else there is stands beside it."""
        raise NotImplementedError

    def tables(self, results: dict[str, Any]) -> list[Sheet]:
        """What the command prints."""
        return [Sheet(self.config.name, self.columns, results["rows"])]

    def summary(self, results: dict[str, Any]) -> dict[str, str]:
        """Single facts printed above the tables, by name."""
        return {}

    def figures(self, results: dict[str, Any]) -> dict[str, str]:
        """Figures by name, as the text of an SVG without style (``studies.svg.standalone`` is applied on writing)."""
        return {}
