"""The report as Markdown beside its figures, and its numbers as CSV."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from . import exhibits
from .analysis import AXES, Analysis, ArmResult
from .exhibits import Table
from .records import StudyRecord


def markdown(analysis: Analysis, figures: str) -> str:
    """The summary; ``figures`` is the folder of the SVG files beside it."""
    record = analysis.record
    counts = ", ".join(f"{n} {state}" for state, n in analysis.counts.items())
    lines = [f"# {record.question or record.name}", "", f"**{analysis.answer}**", ""]
    lines += [
        f"Study `{record.name}` ({record.kind}), metric `{record.metric}` ({record.direction}). Trials: {counts}.",
        "",
    ]
    lines += [line for text in analysis.warnings for line in (f"> {text}", "")]
    if analysis.missing:
        lines += ["This report is partial:", "", *(f"- {text}" for text in analysis.missing), ""]
    lines += _table(exhibits.results(analysis))
    for figure in exhibits.figure_set(analysis):
        lines += [f"## {figure.title}", "", f"![{figure.title}]({figures}/{figure.slug}.svg)", "", figure.note, ""]
    for table in (exhibits.changes(analysis), exhibits.unfinished(analysis), exhibits.environments(analysis)):
        lines += _table(table) if table is not None else []
    lines += [
        "## To repeat",
        "",
        "```",
        *(f"{command}  # {what}" for what, command in exhibits.commands(analysis)),
        "```",
        "",
    ]
    return "\n".join(lines)


def arms_csv(analysis: Analysis) -> str:
    """A line an arm, with full precision; empty cells where a number is not known."""
    by_arm = {c.arm: c for c in analysis.comparisons}
    fields = ("mean", "low", "high", "effect", "p", "test", "p_t", "p_holm", "p_t_holm", "detectable")
    head = [
        "arm",
        "baseline",
        "seeds",
        analysis.record.metric,
        "standard_deviation",
        "pairs",
        *(f"difference_{f}" for f in fields),
    ]
    rows: list[list[Any]] = []
    for arm in analysis.arms:
        c = by_arm.get(arm.name)
        row = [arm.name, analysis.baseline, len(arm.trials), arm.mean, arm.spread, len(c.seeds) if c else ""]
        row += [getattr(c, f) for f in fields] if c is not None and c.seeds else [""] * len(fields)
        rows.append([*row, arm.parameters, *(arm.total(axis) for axis in AXES)])
    return _csv([*head, "parameters", *AXES], rows)


def trials_csv(record: StudyRecord) -> str:
    """A line a trial, whatever its state."""
    params = sorted({name for t in record.trials for name in t.params})
    metrics = sorted({name for t in record.trials for name in t.metrics} - {record.metric})
    head = [
        "trial",
        "state",
        "stage",
        "arm",
        "seed",
        *params,
        record.metric,
        *metrics,
        "parameters",
        *AXES,
        "started",
        "ended",
    ]
    rows: list[list[Any]] = []
    for t in record.trials:
        one = ArmResult(t.arm, {t.seed: t}, t.parameters, [])
        row: list[Any] = [t.number, t.state, t.stage, t.arm, t.seed, *(t.params.get(n, "") for n in params), t.value]
        row += [
            *(t.metrics.get(n) for n in metrics),
            t.parameters,
            *(one.total(axis) for axis in AXES),
            t.started,
            t.ended,
        ]
        rows.append([*row, t.error, " ".join(t.overrides)])
    return _csv([*head, "error", "overrides"], rows)


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(
        [["" if v is None or (isinstance(v, float) and not math.isfinite(v)) else v for v in row] for row in rows]
    )
    return out.getvalue()


def _table(table: Table) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(" --- " if i < table.words else " ---: " for i in range(len(table.head))) + "|"
    return [
        f"## {table.title}",
        "",
        line(table.head),
        rule,
        *(line(r) for r in table.rows),
        "",
        *([table.note, ""] if table.note else []),
    ]
