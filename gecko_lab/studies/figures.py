"""Small SVG figures without a plotting library: intervals, curves, bars and dots, in light and dark.

Each function returns one ``<svg>`` that takes its colours from ``svg.STYLE``; ``svg.standalone`` makes a file of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from zlib import crc32

from .svg import LETTER, WIDTH, Scale, document, horizontal, number, path, text, vertical

BASELINE = "var(--ink)"
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Curve:
    """A line through ``points`` (x, y) and, faint behind it, the lines that it is the mean of."""

    name: str
    points: list[tuple[float, float]]
    faint: list[list[tuple[float, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A difference with its interval and the single differences that it is the mean of."""

    name: str
    mean: float
    low: float
    high: float
    points: tuple[float, ...]
    label: str
    place: int  # of the arm among those that are not the baseline: its colour


@dataclass(frozen=True)
class Dot:
    """A trial: ``x`` is a number or a name; open circles are trials that are not complete."""

    x: float | str
    y: float
    complete: bool
    hint: str
    place: int = 0


def colour(place: int) -> str:
    """The colour of an arm; dashes tell those apart that share one."""
    return f"var(--c{place % 8})"


def forest(rows: Sequence[Row], axis: str, better: str) -> str:
    """Differences from a baseline, one a row: the mean, its interval, each seed. ``better`` is "left" or "right"."""
    left = 24 + LETTER * max(len(r.name) for r in rows)
    right = WIDTH - 30 - LETTER * max(len(r.label) for r in rows)
    core = [v for r in rows for v in (*r.points, r.mean, 0.0) if math.isfinite(v)]
    low, high = min(core), max(core)
    room = 0.75 * (high - low) or 1.0
    low, high = (
        max(low - room, min([low, *(r.low for r in rows)])) - 0.04 * room,
        min(high + room, max([high, *(r.high for r in rows)])) + 0.04 * room,
    )
    x = Scale(low, high, left, right)
    bottom = 34 + 30.0 * len(rows)
    out = [vertical(x, 24, bottom, axis)]
    words = ("better", "worse") if better == "left" else ("worse", "better")
    for word, anchor, shift, arrow in ((words[0], "end", -10, "\u2190 {}"), (words[1], "start", 10, "{} \u2192")):
        out.append(text(x(0) + shift, 14, arrow.format(word), anchor, "soft"))
    out.append(f'<path d="M{x(0):.1f} 20V{bottom:.1f}" style="stroke:var(--soft)" stroke-dasharray="4 3"/>')
    for i, row in enumerate(rows):
        y, tint = 44 + 30.0 * i, colour(row.place)
        out += [text(left - 12, y + 4, row.name, "end"), text(right + 16, y + 4, row.label)]
        if not math.isfinite(row.mean):
            continue
        ends = [min(max(v, low), high) for v in (row.low, row.high)]
        if math.isfinite(row.low):
            out.append(f'<path d="M{x(ends[0]):.1f} {y}H{x(ends[1]):.1f}" style="stroke:{tint};stroke-width:2.5"/>')
            heads: list[tuple[bool, float, float]] = [(row.low < low, x(low), 5.0), (row.high > high, x(high), -5.0)]
            for cut, at, way in heads:
                if cut:
                    out.append(
                        f'<path d="M{at + way:.1f} {y - 4}L{at:.1f} {y}L{at + way:.1f} {y + 4}" '
                        f'style="stroke:{tint};fill:none"/>'
                    )
        out += [
            f'<circle cx="{x(p):.1f}" cy="{y + 9}" r="2.2" style="fill:{tint};fill-opacity:.55"/>' for p in row.points
        ]
        out.append(f'<circle cx="{x(row.mean):.1f}" cy="{y}" r="5" style="fill:{tint}"/>')
    return document(WIDTH, bottom + 42, out, f"Differences: {axis}")


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], y_axis: str, baseline: str | None) -> str:
    """Panels side by side that share the y axis and the names; y is cut above what the curves reach after a tenth."""
    names = [c.name for c in panels[0][1]]
    legend, top = _legend(names, baseline)
    low, high = _window([c for _, group in panels for c in group])
    height, gap, left = 250.0, 26.0, 52.0
    each = (WIDTH - left - gap * (len(panels) - 1) - 12) / len(panels)
    y = Scale(low, high, top + height, top)
    out = [legend]
    mark = f"clip{crc32(repr(panels).encode()):x}"  # a page may hold several figures
    for p, (axis, group) in enumerate(panels):
        start = left + p * (each + gap)
        ends = [points[-1][0] for c in group for points in (c.points, *c.faint) if points]
        x = Scale(0.0, max(ends, default=1.0) or 1.0, start, start + each)
        out.append(
            f'<clipPath id="{mark}{p}">'
            f'<rect x="{start:.1f}" y="{top}" width="{each:.1f}" height="{height}"/></clipPath>'
        )
        out += [vertical(x, top, top + height, axis), horizontal(y, start, start + each, p == 0)]
        out.append(f'<g clip-path="url(#{mark}{p})">')
        for c in group:
            tint = _stroke(c.name, names, baseline)
            out += [f'<path class="line faint" d="{path(points, x, y)}" style="{tint}"/>' for points in c.faint]
        for c in group:
            tint = _stroke(c.name, names, baseline)
            out.append(
                f'<path class="line" d="{path(c.points, x, y)}" style="{tint}"><title>{escape(c.name)}</title></path>'
            )
        out.append("</g>")
    out.append(text(4, top - 10, y_axis, "start", "soft"))
    return document(WIDTH, top + height + 44, out, f"{y_axis} against {', '.join(axis for axis, _ in panels)}")


def bars(rows: Sequence[tuple[str, float]], axis: str) -> str:
    """One bar a row, from zero."""
    left = 24 + LETTER * max(len(name) for name, _ in rows)
    x = Scale(0.0, max(v for _, v in rows) or 1.0, left, WIDTH - 80)
    bottom = 8 + 26.0 * len(rows)
    out = [vertical(x, 8, bottom, axis)]
    for i, (name, value) in enumerate(rows):
        y = 12 + 26.0 * i
        out += [
            text(left - 12, y + 13, name, "end"),
            f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="18" style="fill:{colour(0)}"/>',
            text(x(value) + 8, y + 13, number(value)),
        ]
    return document(WIDTH, bottom + 42, out, axis)


def dots(points: Sequence[Dot], x_axis: str, y_axis: str, names: Sequence[str]) -> str:
    """Trials against one parameter, on a logarithmic axis where it spans decades; a colour for each of ``names``."""
    width, height, left = 460.0, 250.0, 56.0
    legend, top = _legend(list(names), None, width) if len(names) > 1 else ("", 28.0)
    known = [p for p in points if math.isfinite(p.y)]
    y = Scale(*_pad([p.y for p in known if p.complete] or [p.y for p in known]), top + height, top)
    words = sorted({p.x for p in known if isinstance(p.x, str)})
    numbers = [p.x for p in known if not isinstance(p.x, str)]
    out = [legend, horizontal(y, left, width - 12, True)]
    if words or not numbers:
        step = (width - 12 - left) / max(1, len(words))
        at = {word: left + step * (i + 0.5) for i, word in enumerate(words)}
        out += [text(v, top + 18 + height, word, "middle", "soft") for word, v in at.items()]
        out.append(text((left + width - 12) / 2, top + 38 + height, x_axis, "middle"))
        place = lambda v: at[str(v)]
    else:
        log = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
        x = Scale(*((min(numbers) / 1.2, max(numbers) * 1.2) if log else _pad(numbers)), left, width - 12, log)
        out.append(vertical(x, top, top + height, x_axis))
        place = lambda v: x(float(v))
    for p in known:
        tint = (
            f"fill:{colour(p.place)};fill-opacity:.8"
            if p.complete
            else f"fill:none;stroke:{colour(p.place)};stroke-opacity:.6"
        )
        cy = min(max(y(p.y), top), top + height)
        out.append(
            f'<circle cx="{place(p.x):.1f}" cy="{cy:.1f}" r="4" style="{tint}"><title>{escape(p.hint)}</title></circle>'
        )
    out.append(text(4, top - 14, y_axis, "start", "soft"))
    return document(width, top + height + 46, out, f"{y_axis} against {x_axis}")


def _window(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest value to the highest that a mean has after the first tenth of its points."""
    values = [y for c in curves for y in [p[1] for p in c.points][len(c.points) // 10 :] if math.isfinite(y)]
    lowest = [min(ys) for c in curves for line in c.faint if (ys := [p[1] for p in line if math.isfinite(p[1])])]
    late = [[p[1] for p in c.points][max(1, len(c.points) // 10)] for c in curves if len(c.points) > 2]
    high = max([v for v in late if math.isfinite(v)], default=max(values, default=1.0))
    return _pad([min([*values, *lowest], default=0.0), high])


def _pad(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _stroke(name: str, names: list[str], baseline: str | None) -> str:
    others = [n for n in names if n != baseline]
    if name == baseline:
        return f"stroke:{BASELINE}"
    place = others.index(name)
    return f"stroke:{colour(place)};stroke-dasharray:{DASHES[place // 8 % 4] or 'none'}"


def _legend(names: list[str], baseline: str | None, room: float = WIDTH) -> tuple[str, float]:
    out, x, y = [], 8.0, 14.0
    for name in names:
        width = 40 + LETTER * len(name)
        if x + width > room:
            x, y = 8.0, y + 20
        out.append(
            f'<path class="line" d="M{x} {y}h22" style="{_stroke(name, names, baseline)}"/>' + text(x + 28, y + 4, name)
        )
        x += width + 10
    return "".join(out), y + 36
