"""Axes, text and frame of an SVG, and how numbers are written beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

STYLE = """
:root, svg { --ink: #1c2330; --soft: #5c6675; --rule: #e2e6ec; --paper: #ffffff;
  --c0: #0b66b0; --c1: #c8500a; --c2: #0a8a63; --c3: #b0487f;
  --c4: #a57900; --c5: #3c8fbf; --c6: #7353b5; --c7: #7a6a52; }
@media (prefers-color-scheme: dark) { :root, svg { --ink: #e7ebf2; --soft: #9aa5b5; --rule: #2c3441; --paper: #12161d;
  --c0: #5aa9ea; --c1: #f08a4b; --c2: #3fc796; --c3: #e07fb4;
  --c4: #dcb13c; --c5: #7cc4ee; --c6: #a98bea; --c7: #bba98c; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); }
svg .rule { stroke: var(--rule); fill: none; } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .faint { stroke-width: 1; stroke-opacity: .28; }
"""
LETTER = 6.6  # width of a letter in pixels, on average
WIDTH = 940.0


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


def path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    """Through the finite points; a gap where a value is missing."""
    parts, drawing = [], False
    for px, py in points:
        finite = math.isfinite(px) and math.isfinite(py)
        if finite:
            parts.append(f"{'L' if drawing else 'M'}{x(px):.1f} {y(py):.1f}")
        drawing = finite
    return "".join(parts)


def vertical(x: Scale, top: float, bottom: float, label: str) -> str:
    marks = x.ticks()
    out = [f'<path class="rule" d="M{x(v):.1f} {top}V{bottom}"/>' for v in marks]
    wide = min((b - a for a, b in pairwise([x(v) for v in marks])), default=99.0) < 34
    out += [text(x(v), bottom + 18, number(v), "middle", "soft") for v in marks[:: 2 if wide else 1]]
    return "".join(
        [
            *out,
            f'<path class="axis" d="M{x.start:.1f} {bottom}H{x.end:.1f}"/>',
            text((x.start + x.end) / 2, bottom + 38, label, "middle"),
        ]
    )


def horizontal(y: Scale, left: float, right: float, labels: bool) -> str:
    out = [f'<path class="rule" d="M{left:.1f} {y(v):.1f}H{right:.1f}"/>' for v in y.ticks()]
    return "".join(out + [text(left - 8, y(v) + 4, number(v, 4), "end", "soft") for v in y.ticks() if labels])


def text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def document(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
