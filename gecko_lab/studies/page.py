"""The report as one HTML page that needs no server, no script and no other file."""

from __future__ import annotations

from html import escape

from . import exhibits, svg
from .analysis import Analysis
from .exhibits import Figure, Table
from .repeat import run_command

LONG = 15  # rows of a table that stay in sight
CSS = """
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .3rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
.kind { color: var(--soft); margin: 0; } .answer { font-size: 1.15rem; margin: 0 0 1rem; }
.facts { color: var(--soft); font-size: .9rem; margin: 0; }
.box { border-left: 4px solid var(--c4); padding: .1rem 1rem; margin: 1.2rem 0;
  background: color-mix(in srgb, var(--c4) 9%, transparent); }
.box.gap { border-color: var(--c5); background: color-mix(in srgb, var(--c5) 9%, transparent); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; width: 100%; }
th, td { text-align: right; padding: .35rem .45rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
td { font-variant-numeric: tabular-nums; }
.word { text-align: left; } .long td.word { white-space: normal; overflow-wrap: anywhere; }
.strong td { font-weight: 600; }
.note, figcaption { color: var(--soft); font-size: .84rem; margin: .5rem 0 0; } figure { margin: 0 0 1.4rem; }
svg { width: 100%; height: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.grid svg { max-width: 34rem; }
pre { background: color-mix(in srgb, var(--soft) 10%, transparent);
  padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; margin: .2rem 0 1rem; }
@media (max-width: 60rem) { .chart { overflow-x: auto; } .chart svg { min-width: 46rem; } }
@media print { main { max-width: none; } }
"""


def page(analysis: Analysis) -> str:
    """The whole page."""
    record = analysis.record
    exhibited = exhibits.figure_set(analysis)
    counts = ", ".join(f"{n} {state}" for state, n in analysis.counts.items())
    goal = "lower" if record.direction == "minimize" else "higher"
    parts = [
        f'<p class="kind">{escape(record.kind)} study: {escape(record.name)}</p>',
        f"<h1>{escape(record.question or record.name)}</h1>",
        f'<p class="answer">{escape(analysis.answer)}</p>',
        f'<p class="facts">Metric: {escape(record.metric)}, {goal} is better. Trials: {counts}.</p>',
        *(f'<div class="box"><p>{escape(text)}</p></div>' for text in analysis.warnings),
    ]
    if analysis.missing:
        items = "".join(f"<li>{escape(text)}</li>" for text in analysis.missing)
        parts.append(f'<div class="box gap"><p>This report is partial:</p><ul>{items}</ul></div>')
    parts.append(_table(exhibits.results(analysis)))
    parts += [_figure(f) for f in exhibited if not f.slug.startswith("slice_")]
    slices = [f for f in exhibited if f.slug.startswith("slice_")]
    if slices:
        grid = "".join(f"<figure>{f.svg}</figure>" for f in slices)
        parts.append(f'<h2>Slices</h2><div class="grid">{grid}</div><p class="note">{escape(slices[0].note)}</p>')
    for table in (exhibits.changes(analysis), exhibits.unfinished(analysis), exhibits.environments(analysis)):
        if table is not None:
            parts.append(_table(table) if len(table.rows) <= LONG else _folded(table))
    parts.append("<h2>To repeat</h2>")
    parts += [
        f'<p class="note">{escape(what)}</p><pre>{escape(line)}</pre>' for what, line in exhibits.commands(analysis)
    ]
    parts.append(_runs(analysis))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(record.name)}</title>'
        f"<style>{svg.STYLE}{CSS}</style></head><body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _figure(figure: Figure) -> str:
    return (
        f'<h2>{escape(figure.title)}</h2><figure><div class="chart">{figure.svg}</div>'
        f"<figcaption>{escape(figure.note)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        kinds = (' class="word"' if i < table.words else "" for i in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(
        f"<tr{' class=strong' if i == table.strong else ''}>{row(r, 'td')}</tr>" for i, r in enumerate(table.rows)
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    long = ' class="long"' if table.words > 1 else ""
    return (
        f'<h2>{escape(table.title)}</h2><div class="wide"><table{long}><thead><tr>{row(table.head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _folded(table: Table) -> str:
    body = _table(table).partition("</h2>")[2]
    return f"<h2>{escape(table.title)}</h2><details><summary>{len(table.rows)} rows</summary>{body}</details>"


def _runs(analysis: Analysis) -> str:
    lines = "\n".join(
        f"# trial {t.number}: {t.arm}, seed {t.seed}, {t.state}\n{run_command(t)}" for t in analysis.record.trials
    )
    return f"<details><summary>The command of every run</summary><pre>{escape(lines)}</pre></details>"
