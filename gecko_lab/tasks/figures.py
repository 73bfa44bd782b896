"""Figures of evaluations as SVG: curves over a logarithmic axis, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from ..studies.figures import colour
from ..studies.svg import LETTER, Scale, document, horizontal, number, path, text

WIDTH = 640.0


@dataclass(frozen=True)
class Line:
    """A curve through ``points`` (x, y); ``band`` (x, low, high) is drawn behind it; ``marks`` shows every point."""

    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    dashed: bool = False
    marks: bool = True


def lines(
    title: str,
    group: Sequence[Line],
    x_axis: str,
    y_axis: str,
    *,
    log_x: bool = True,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves that share their axes, with a legend; ``marks`` are vertical lines (x, label). Points that are not finite
    (or not positive on a logarithmic axis) are left out."""
    fits = lambda v, log: v is not None and math.isfinite(v) and (v > 0 or not log)
    group = [Line(g.name, [p for p in g.points if fits(p[0], log_x) and fits(p[1], log_y)],
                  [b for b in g.band if fits(b[1], log_y) and fits(b[2], log_y)], g.dashed, g.marks)
             for g in group]  # fmt: skip
    xs = [x for g in group for x, _ in g.points]
    ys = [y for g in group for _, y in g.points] + [y for g in group for _, low, high in g.band for y in (low, high)]
    if not xs:
        return document(WIDTH, 40, [text(12, 24, f"{title}: nothing to draw")], title)
    legend, top = _legend(group)
    left, right, height = 62.0, WIDTH - 24, 260.0
    x = Scale(min(xs), max(xs), left, right, log_x)
    low, high = y_range or _room(min(ys), max(ys), log_y)
    y = Scale(low, high, top + height, top, log_y)
    out = [text(8, 18, title), legend, _vertical(x, top, top + height, x_axis), horizontal(y, left, right, True)]
    for at, label in marks:
        if x.low < at < x.high:
            out.append(f'<path class="axis" d="M{x(at):.1f} {top}V{top + height}" stroke-dasharray="2 3"/>')
            out.append(text(x(at) + 4, top + 12, label, "start", "soft"))
    for i, g in enumerate(group):
        if g.band:
            edge = [f"{x(a):.1f} {y(h):.1f}" for a, _, h in g.band]
            edge += [f"{x(a):.1f} {y(low):.1f}" for a, low, _ in reversed(g.band)]
            out.append(f'<path d="M{"L".join(edge)}Z" style="fill:{colour(i)};fill-opacity:.16"/>')
        out.append(f'<path class="line" d="{path(g.points, x, y)}" style="{_stroke(g, i)}"/>')
        if g.marks:
            out += [
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" style="fill:{colour(i)}">'
                f"<title>{escape(g.name)}: {number(a, 4)}, {number(b, 4)}</title></circle>"
                for a, b in g.points
            ]
    out.append(text(8, top - 10, y_axis, "start", "soft"))
    return document(WIDTH, top + height + 48, out, f"{title}: {y_axis} against {x_axis}")


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    x_axis: str,
    y_axis: str,
    *,
    low: float = 0.0,
    high: float = 1.0,
    form: str = ".0%",
) -> str:
    """values[row][column] as coloured cells with the number in each, from ``low`` (pale) to ``high`` (full colour)."""
    left = 30 + LETTER * max(len(r) for r in rows)
    wide = min(92.0, max(46.0, (WIDTH - left - 16) / len(columns)))
    tall, top = 30.0, 50.0
    out = [text(8, 18, title), text(8, top - 10, y_axis, "start", "soft")]
    for r, name in enumerate(rows):
        out.append(text(left - 8, top + tall * r + 20, name, "end", "soft"))
        for c, value in enumerate(values[r]):
            at, down = left + wide * c, top + tall * r
            if value is None or not math.isfinite(value):
                out.append(text(at + wide / 2, down + 20, "-", "middle", "soft"))
                continue
            share = min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))
            out.append(
                f'<rect x="{at + 1:.1f}" y="{down + 1:.1f}" width="{wide - 2:.1f}" height="{tall - 2:.1f}" rx="2" '
                f'style="fill:var(--c0);fill-opacity:{0.06 + 0.84 * share:.3f}"/>'
            )
            tone = ' style="fill:var(--paper)"' if share > 0.6 else ""
            out.append(
                f'<text x="{at + wide / 2:.1f}" y="{down + 20:.1f}" text-anchor="middle"{tone}>{value:{form}}</text>'
            )
    bottom = top + tall * len(rows)
    for c, name in enumerate(columns):
        out.append(text(left + wide * (c + 0.5), bottom + 18, name, "middle", "soft"))
    out.append(text(left, bottom + 38, x_axis))
    return document(max(WIDTH, left + wide * len(columns) + 16), bottom + 50, out, title)


def tokens(count: float) -> str:
    """A number of tokens as the field writes it: 512, 4K = 4,096, 1M = 1,048,576."""
    for unit, letter in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.0f}"


def _vertical(x: Scale, top: float, bottom: float, label: str) -> str:
    """Rules and numbers; on a logarithmic axis at powers of two, at most ten of them."""
    if x.log:
        powers = range(math.ceil(math.log2(x.low) - 1e-9), math.floor(math.log2(x.high) + 1e-9) + 1)
        step = max(1, -(-len(powers) // 10))
        marks = [(2.0**p, tokens(2.0**p)) for p in powers[::step]] or [(x.low, tokens(x.low))]
    else:
        marks = [(v, number(v)) for v in x.ticks()]
    out = [f'<path class="rule" d="M{x(v):.1f} {top}V{bottom}"/>' for v, _ in marks]
    out += [text(x(v), bottom + 18, name, "middle", "soft") for v, name in marks]
    out.append(f'<path class="axis" d="M{x.start:.1f} {bottom}H{x.end:.1f}"/>')
    return "".join([*out, text((x.start + x.end) / 2, bottom + 38, label, "middle")])


def _stroke(line: Line, place: int) -> str:
    return f"stroke:{colour(place)}" + (";stroke-dasharray:6 3" if line.dashed else "")


def _legend(group: Sequence[Line]) -> tuple[str, float]:
    out, x, y = [], 8.0, 40.0
    for i, line in enumerate(group):
        width = 40 + LETTER * len(line.name)
        if x + width > WIDTH and x > 8:
            x, y = 8.0, y + 20
        out.append(f'<path class="line" d="M{x} {y}h22" style="{_stroke(line, i)}"/>' + text(x + 28, y + 4, line.name))
        x += width + 12
    return "".join(out), y + 40


def _room(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return (low / 1.1, high * 1.1)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
