"""Small SVG figures without a plotting library: intervals, curves, bars and dots, in light and dark.

Each function returns one ``<svg>`` that inherits its colours from ``STYLE``; ``standalone`` makes a file of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from zlib import crc32

STYLE = """
:root, svg { --ink: #1c2330; --soft: #5c6675; --rule: #e2e6ec; --paper: #ffffff;
  --c0: #0b66b0; --c1: #c8500a; --c2: #0a8a63; --c3: #b0487f; --c4: #a57900; --c5: #3c8fbf; --c6: #7353b5; --c7: #7a6a52; }
@media (prefers-color-scheme: dark) { :root, svg { --ink: #e7ebf2; --soft: #9aa5b5; --rule: #2c3441; --paper: #12161d;
  --c0: #5aa9ea; --c1: #f08a4b; --c2: #3fc796; --c3: #e07fb4; --c4: #dcb13c; --c5: #7cc4ee; --c6: #a98bea; --c7: #bba98c; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .rule { stroke: var(--rule); fill: none; } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .faint { stroke-width: 1; stroke-opacity: .28; }
"""
BASELINE = "var(--ink)"
DASHES = ("", "6 3", "2 3", "8 3 2 3")
LETTER = 6.6  # width of a letter in pixels, on average
WIDTH = 940.0


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


def standalone(svg: str) -> str:
    """An SVG file that brings its own colours."""
    return svg.replace(">", f"><style>{STYLE}\nsvg {{ background: var(--paper); }}</style>", 1)


def number(value: float, digits: int = 3) -> str:
    """A number as a person writes it: 0.0012, 3.4M, 1.2e-05."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    for limit, unit, suffix in (
        (1e15, 1e15, "P"),
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if limit <= size < 1e18:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}" if size < 1000 or size >= 1e18 else f"{value:.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (v - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high) if self.high > self.low else [self.low]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            marks = [
                p * 10.0**d for d in decades for p in parts if self.low * 0.999 <= p * 10.0**d <= self.high * 1.001
            ]
            if len(marks) >= 3:
                return marks
        return marks or [self.low, self.high]


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
    out = [_vertical(x, 24, bottom, axis)]
    words = ("better", "worse") if better == "left" else ("worse", "better")
    for word, anchor, at, arrow in ((words[0], "end", -10, "\u2190 {}"), (words[1], "start", 10, "{} \u2192")):
        out.append(_text(x(0) + at, 14, arrow.format(word), anchor, "soft"))
    out.append(f'<path d="M{x(0):.1f} 20V{bottom:.1f}" style="stroke:var(--soft)" stroke-dasharray="4 3"/>')
    for i, row in enumerate(rows):
        y, tint = 44 + 30.0 * i, colour(row.place)
        out += [_text(left - 12, y + 4, row.name, "end"), _text(right + 16, y + 4, row.label)]
        if not math.isfinite(row.mean):
            continue
        ends = [min(max(v, low), high) for v in (row.low, row.high)]
        if math.isfinite(row.low):
            out.append(f'<path d="M{x(ends[0]):.1f} {y}H{x(ends[1]):.1f}" style="stroke:{tint};stroke-width:2.5"/>')
            for cut, at, way in ((row.low < low, x(low), 5), (row.high > high, x(high), -5)):
                if cut:
                    out.append(
                        f'<path d="M{at + way:.1f} {y - 4}L{at:.1f} {y}L{at + way:.1f} {y + 4}" style="stroke:{tint};fill:none"/>'
                    )
        out += [
            f'<circle cx="{x(p):.1f}" cy="{y + 9}" r="2.2" style="fill:{tint};fill-opacity:.55"/>' for p in row.points
        ]
        out.append(
            f'<circle cx="{x(row.mean):.1f}" cy="{y}" r="5" style="fill:{tint}"><title>{escape(row.label)}</title></circle>'
        )
    return _svg(WIDTH, bottom + 42, out, f"Differences: {axis}")


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
        ends = [pt[0] for c in group for pt in c.points]
        x = Scale(0.0, max(ends, default=1.0) or 1.0, start, start + each)
        out.append(
            f'<clipPath id="{mark}{p}"><rect x="{start:.1f}" y="{top}" width="{each:.1f}" height="{height}"/></clipPath>'
        )
        out += [_vertical(x, top, top + height, axis), _horizontal(y, start, start + each, p == 0)]
        out.append(f'<g clip-path="url(#{mark}{p})">')
        for c in group:
            tint = _stroke(c.name, names, baseline)
            out += [f'<path class="line faint" d="{_path(points, x, y)}" style="{tint}"/>' for points in c.faint]
        for c in group:
            tint = _stroke(c.name, names, baseline)
            out.append(
                f'<path class="line" d="{_path(c.points, x, y)}" style="{tint}"><title>{escape(c.name)}</title></path>'
            )
        out.append("</g>")
    out.append(_text(4, top - 10, y_axis, "start", "soft"))
    return _svg(WIDTH, top + height + 44, out, f"{y_axis} against {', '.join(axis for axis, _ in panels)}")


def bars(rows: Sequence[tuple[str, float]], axis: str) -> str:
    """One bar a row, from zero."""
    left = 24 + LETTER * max(len(name) for name, _ in rows)
    x = Scale(0.0, max(v for _, v in rows) or 1.0, left, WIDTH - 80)
    bottom = 8 + 26.0 * len(rows)
    out = [_vertical(x, 8, bottom, axis)]
    for i, (name, value) in enumerate(rows):
        y = 12 + 26.0 * i
        out += [
            _text(left - 12, y + 13, name, "end"),
            f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="18" style="fill:{colour(0)}"/>',
            _text(x(value) + 8, y + 13, number(value)),
        ]
    return _svg(WIDTH, bottom + 42, out, axis)


def dots(points: Sequence[Dot], x_axis: str, y_axis: str, names: Sequence[str]) -> str:
    """Trials against one parameter, on a logarithmic axis where it spans decades; a colour for each of ``names``."""
    width, height, left = 460.0, 250.0, 56.0
    legend, top = _legend(list(names), None, width) if len(names) > 1 else ("", 28.0)
    known = [p for p in points if math.isfinite(p.y)]
    y = Scale(*_pad([p.y for p in known if p.complete] or [p.y for p in known]), top + height, top)
    words = sorted({p.x for p in known if isinstance(p.x, str)})
    numbers = [p.x for p in known if not isinstance(p.x, str)]
    out = [legend, _horizontal(y, left, width - 12, True)]
    if words or not numbers:
        step = (width - 12 - left) / max(1, len(words))
        at = {word: left + step * (i + 0.5) for i, word in enumerate(words)}
        out += [_text(v, top + 18 + height, word, "middle", "soft") for word, v in at.items()]
        out.append(_text((left + width - 12) / 2, top + 38 + height, x_axis, "middle"))
        place = lambda v: at[str(v)]
    else:
        log = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
        x = Scale(*((min(numbers) / 1.2, max(numbers) * 1.2) if log else _pad(numbers)), left, width - 12, log)
        out.append(_vertical(x, top, top + height, x_axis))
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
    out.append(_text(4, top - 14, y_axis, "start", "soft"))
    return _svg(width, top + height + 46, out, f"{y_axis} against {x_axis}")


def _window(curves: Sequence[Curve]) -> tuple[float, float]:
    """The y values of the curves after the first tenth of their points."""
    values = [y for c in curves for y in [p[1] for p in c.points][len(c.points) // 10 :] if math.isfinite(y)]
    late = [[p[1] for p in c.points][max(1, len(c.points) // 10)] for c in curves if len(c.points) > 2]
    high = max([v for v in late if math.isfinite(v)], default=max(values, default=1.0))
    return _pad([min(values, default=0.0), high])


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
            f'<path class="line" d="M{x} {y}h22" style="{_stroke(name, names, baseline)}"/>'
            + _text(x + 28, y + 4, name)
        )
        x += width + 10
    return "".join(out), y + 36


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    """Through the finite points; a gap where a value is missing."""
    parts, drawing = [], False
    for px, py in points:
        finite = math.isfinite(px) and math.isfinite(py)
        if finite:
            parts.append(f"{'L' if drawing else 'M'}{x(px):.1f} {y(py):.1f}")
        drawing = finite
    return "".join(parts)


def _vertical(x: Scale, top: float, bottom: float, label: str) -> str:
    marks = x.ticks()
    out = [f'<path class="rule" d="M{x(v):.1f} {top}V{bottom}"/>' for v in marks]
    wide = min((b - a for a, b in pairwise([x(v) for v in marks])), default=99.0) < 34
    out += [_text(x(v), bottom + 18, number(v), "middle", "soft") for v in marks[:: 2 if wide else 1]]
    return "".join(
        [
            *out,
            f'<path class="axis" d="M{x.start:.1f} {bottom}H{x.end:.1f}"/>',
            _text((x.start + x.end) / 2, bottom + 38, label, "middle"),
        ]
    )


def _horizontal(y: Scale, left: float, right: float, labels: bool) -> str:
    out = [f'<path class="rule" d="M{left:.1f} {y(v):.1f}H{right:.1f}"/>' for v in y.ticks()]
    return "".join(out + [_text(left - 8, y(v) + 4, number(v, 4), "end", "soft") for v in y.ticks() if labels])


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{f" class={kind!r}" if kind else ""}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
