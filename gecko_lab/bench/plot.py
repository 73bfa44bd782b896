"""The plot of the time of a token against the length of the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..studies.svg import LETTER, WIDTH, Scale, document, horizontal, path, text

CURVES = (
    ("gecko", "training", "Gecko, forward and backward", "var(--c0)", ""),
    ("llama", "training", "Llama, forward and backward", "var(--c1)", ""),
    ("gecko", "inference", "Gecko, reading", "var(--c0)", "6 3"),
    ("llama", "inference", "Llama, reading", "var(--c1)", "6 3"),
)


def context_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Both axes logarithmic; a curve ends where memory or patience did."""
    points = {
        (family, mode): [
            (float(r["length"]), float(r["us_per_token"]))
            for r in rows
            if (r["family"], r["mode"]) == (family, mode) and r["us_per_token"] is not None
        ]
        for family, mode, *_ in CURVES
    }
    every = [p for curve in points.values() for p in curve]
    if not every:
        raise ValueError("no point was measured: there is nothing to draw")
    lengths, times = sorted({x for x, _ in every}), [y for _, y in every]
    top, bottom, left = 46.0, 380.0, 64.0
    longest = max(x for x, _ in every)
    edge = [name for f, m, name, *_ in CURVES if points[f, m] and points[f, m][-1][0] == longest]
    right = WIDTH - 24 - LETTER * max(map(len, edge))
    x = Scale(lengths[0], max(lengths[-1], 2 * lengths[0]), left, right, log=True)
    y = Scale(min(times) / 1.3, max(times) * 1.3, bottom, top, log=True)
    out = [text(left, 24, "microseconds a token, one layer", "start", "soft"), horizontal(y, left, right, True)]
    for length in lengths:
        out.append(f'<path class="rule" d="M{x(length):.1f} {top}V{bottom}"/>')
        out.append(text(x(length), bottom + 18, _power(int(length)), "middle", "soft"))
    out.append(f'<path class="axis" d="M{left} {bottom}H{right:.1f}"/>')
    out.append(text((left + right) / 2, bottom + 40, "tokens of context", "middle"))
    ends = []
    for family, mode, name, tint, dash in CURVES:
        curve = points[family, mode]
        if not curve:
            continue
        out.append(
            f'<path class="line" d="{path(curve, x, y)}" style="stroke:{tint}" stroke-dasharray="{dash or "none"}"/>'
        )
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" style="fill:{tint}"/>' for a, b in curve]
        ends.append((y(curve[-1][1]), x(curve[-1][0]), name))
    placed = -math.inf  # names beside the last points, never on top of each other
    for at, start, name in sorted(ends):
        if start < right - 1:  # a curve that ends inside
            fits = start + 10 + LETTER * len(name) <= right + 24  # or it meets the names of the others
            out.append(text(start + 10, at + 4, name) if fits else text(start - 8, at - 4, name, "end"))
            continue
        placed = max(at + 4, placed + 15)
        out.append(text(start + 10, placed, name))
    return document(WIDTH, bottom + 56, out, "Time of a token against the length of the context")


def _power(length: int) -> str:
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if length >= unit:
            return f"{length // unit}{letter}"
    return str(length)
