"""The tables and figures of a report, the same for the page and the summary."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

from . import figures, recall
from .analysis import AXES, Analysis, ArmResult
from .curves import curves
from .records import TrialRecord
from .repeat import run_command
from .svg import number

BEST_TRIALS = 10
BEST_OF_ARM = 3


@dataclass
class Table:
    """Rows of text below ``head``; ``words`` columns of words, then numbers. ``strong``: the row to stress."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    words: int = 1
    strong: int | None = None


@dataclass
class Figure:
    """An SVG with what a reader must know to read it; ``slug`` names its file."""

    slug: str
    title: str
    svg: str
    note: str


def results(analysis: Analysis) -> Table:
    """The arms of an ablation, or the best trials of a search."""
    return _arms(analysis) if analysis.baseline is not None else _best(analysis)


def _arms(analysis: Analysis) -> Table:
    metric = analysis.record.metric
    many = all(c.test == "t" for c in analysis.comparisons)
    head = [
        "arm",
        metric,
        "seeds",
        "difference [95 % interval]",
        "d_z",
        *([] if many else ["p exact"]),
        "p (t)",
        "detectable",
    ]
    head += ["parameters", "training FLOPs", "seconds"]
    by_arm = {c.arm: c for c in analysis.comparisons}
    rows = []
    for arm in analysis.arms:
        row = [arm.name, _mean(arm), str(len(arm.trials))]
        c = by_arm.get(arm.name)
        if c is None or not c.seeds:
            row += ["baseline" if c is None else "no pair", *[""] * (3 if many else 4)]
        else:
            interval = f" [{c.low:+.4f}, {c.high:+.4f}]" if math.isfinite(c.low) else ""
            p_values = [number(p, 3) for p in ([c.p_t_holm] if many else [c.p_holm, c.p_t_holm])]
            row += [f"{c.mean:+.4f}{interval}", number(c.effect, 2), *p_values, number(c.detectable, 2)]
        sizes = (float(arm.parameters) if arm.trials else math.nan, arm.total("flops"), arm.total("seconds"))
        rows.append([*row, *(number(size) for size in sizes)])
    exact = "" if many else "p exact: two-sided sign-flip test, which assumes no distribution; "
    over = f"{len(analysis.comparisons)} arm{'s' if len(analysis.comparisons) > 1 else ''}"
    note = (
        "Mean \u00b1 standard deviation over seeds. Differences are paired by seed (the same data in the same order), "
        "arm minus baseline, with 95 % t intervals, each for itself. d_z: mean over standard deviation of the "
        "differences. "
        f"{exact}p (t): paired t-test, two-sided, if differences are normal; p is Holm-corrected over {over}. "
        "detectable: the true difference that the t-test, uncorrected, would find four times in five with this many "
        "seeds and this spread."
    )
    return Table("Arms", head, rows, note, strong=0)


def _best(analysis: Analysis) -> Table:
    several = len(analysis.arms) > 1
    shown = [t for arm in analysis.arms for t in list(arm.trials.values())[: BEST_OF_ARM if several else BEST_TRIALS]]
    names = sorted({name for t in shown for name in t.params})
    rows = []
    for t in shown:
        one = ArmResult("", {0: t}, t.parameters, [])
        sizes = (float(t.parameters), one.total("flops"), one.total("seconds"))
        settings = [_setting(t.params.get(n)) for n in names]
        rows.append(
            [*([t.arm] if several else []), str(t.number), *settings, number(t.value or 0.0, 5), *map(number, sizes)]
        )
    metric = analysis.record.metric
    head = [*(["arm"] if several else []), "trial", *names, metric, "parameters", "training FLOPs", "seconds"]
    note = f"{len(shown)} of {analysis.counts['complete']} complete trials" + (
        ", the best of each arm." if several else "."
    )
    return Table("Best trials", head, rows, note, strong=None if several else 0)


def changes(analysis: Analysis) -> Table | None:
    """What each arm changes and how far its size is from the baseline's; None where there are no arms."""
    arms = analysis.record.arms
    if len(arms) < 2:
        return None
    first = next((a for a in arms if a.name == analysis.baseline), arms[0])
    rows = []
    for arm in arms:
        sizes = [(arm.parameters, first.parameters), (arm.flops_per_token, first.flops_per_token)]
        off = ["" if arm is first or not theirs else f"{mine / theirs - 1:+.2%}" for mine, theirs in sizes]
        tuned = dict(analysis.tuned.get(arm.name, {}))
        chosen = " ".join(f"{k}={_setting(v)}" for k, v in tuned.items())
        rows.append([arm.name, " ".join(arm.overrides) or "no change", chosen, _size(arm.parameters), off[0]])
        rows[-1] += [_size(arm.flops_per_token), off[1]]
    head = ["arm", "overrides", "tuned", "parameters", f"to {first.name}", "forward FLOPs a token", f"to {first.name}"]
    if not any(row[2] for row in rows):
        rows, head = [r[:2] + r[3:] for r in rows], head[:2] + head[3:]
    return Table("What the arms change", head, rows, words=len(head) - 4)


def unfinished(analysis: Analysis) -> Table | None:
    """Trials that are not complete, with the reason; None when all are."""
    rows = []
    for t in analysis.unfinished:
        value = "" if t.value is None else number(t.value, 4)
        rows.append([str(t.number), t.state, _name(analysis, t), str(t.seed), _reason(t), value])
    head = [
        "trial",
        "state",
        "arm" if analysis.baseline is not None else "setting",
        "seed",
        "reason",
        "last " + analysis.record.metric,
    ]
    return Table("Trials that are not complete", head, rows, words=5) if rows else None


def _reason(t: TrialRecord) -> str:
    if t.state == "pruned":
        step = max(t.intermediate, default=None)
        return "worse than the other trials" + (f" at step {step}" if step is not None else "")
    lines = (t.error or "").strip().splitlines()
    reason = lines[-1] if lines else "" if t.state in ("running", "waiting") else "no reason recorded"
    return reason + (" (retried by another trial)" if t.retried else "")


def figure_set(analysis: Analysis) -> list[Figure]:
    """The figures that the study's data allow, in reading order."""
    found = [_recall(analysis), _forest(analysis), *_curves(analysis)]
    if analysis.importances:
        note = "PED-ANOVA: how much a parameter separates the better trials from all, as shares of 1."
        found.append(
            Figure("importance", "Importance", figures.bars(list(analysis.importances.items()), "importance"), note)
        )
    if analysis.baseline is None:
        found += _slices(analysis)
    return [f for f in found if f is not None]


def _recall(analysis: Analysis) -> Figure | None:
    if not recall.applies(analysis):
        return None
    return Figure("state", "Accuracy against the size of the state", *recall.figure(analysis))


def _forest(analysis: Analysis) -> Figure | None:
    places = {c.arm: i for i, c in enumerate(analysis.comparisons)}
    rows = []
    for c in sorted((c for c in analysis.comparisons if c.seeds), key=lambda c: c.mean):
        label = f"{c.mean:+.4f}" + (f"  [{c.low:+.4f}, {c.high:+.4f}]" if math.isfinite(c.low) else "  one seed")
        rows.append(figures.Row(c.arm, c.mean, c.low, c.high, c.differences, label, places[c.arm]))
    if not rows:
        return None
    axis = f"difference in {analysis.record.metric} to {analysis.baseline}"
    note = "Large dots: means. Bars: 95 % t intervals, with an arrowhead where one is cut. Small dots: single seeds."
    return Figure("differences", "Differences to the baseline", figures.forest(rows, axis, analysis.better), note)


def _curves(analysis: Analysis) -> list[Figure]:
    found = []
    for metric in dict.fromkeys((analysis.record.metric, "train/loss")):
        panels = [(label, curves(analysis, metric, axis)) for axis, label in AXES.items()]
        panels = [(label, group) for label, group in panels if any(len(c.points) > 1 for c in group)]
        if not panels:
            continue
        who = "means over seeds, single seeds faint" if analysis.baseline is not None else "the best trials"
        note = f"Lines: {who}. The first tenth of a run may lie above the frame."
        slug = "curve_" + metric.replace("/", "_")
        found.append(Figure(slug, metric, figures.curves(panels, metric, analysis.baseline), note))
    return found


def _slices(analysis: Analysis) -> list[Figure]:
    """The metric against each searched parameter."""
    record = analysis.record
    done = [t for t in record.trials if t.value is not None and t.state in ("complete", "pruned")]
    places = {arm.name: i for i, arm in enumerate(analysis.arms)}
    found = []
    for name in sorted({n for t in done for n in t.params}, key=lambda n: -analysis.importances.get(n, 0.0)):
        points = [
            figures.Dot(
                _place(t.params[name]),
                float(t.value),
                t.state == "complete",
                f"trial {t.number}, {t.arm}: {number(float(t.value), 4)}",
                places.get(t.arm, 0),
            )
            for t in done
            if name in t.params and t.value is not None
        ]
        note = "Filled: complete trials. Open: pruned ones, at their last value."
        found.append(
            Figure(
                f"slice_{name.replace('.', '_')}", name, figures.dots(points, name, record.metric, list(places)), note
            )
        )
    return found


def commands(analysis: Analysis) -> list[tuple[str, str]]:
    """What repeats the study, this report and its best single run."""
    record = analysis.record
    where = shlex.quote(f"studies/{record.folder.name}")
    return [
        (
            "the study, or what is missing of it; the file lies beside this report",
            f"python -m gecko_lab.sweep {shlex.quote(record.name)}.yaml",
        ),
        ("this report", f"python -m gecko_lab.report {where}"),
        ("its runs in TensorBoard", f"python -m gecko_lab.compare {where}"),
        (f"the best run by itself (trial {analysis.best.number})", run_command(analysis.best)),
    ]


def environments(analysis: Analysis) -> Table | None:
    """The machines and versions that the complete runs recorded."""
    rows = []
    for e in analysis.environments:
        versions = e.get("versions") or {}
        device = e.get("gpu") or f"CPU, {e.get('cpu_threads')} threads"
        rows.append(
            [
                (e.get("git_commit") or "not a checkout").replace("-dirty", " with changes"),
                f"{device}, kernels {e.get('kernels')}",
                f"Python {e.get('python')}, "
                + ", ".join(f"{k} {versions[k]}" for k in ("torch", "lightning", "optuna") if k in versions),
                (e.get("fingerprint") or "-")[:12],
                str(e["runs"]),
            ]
        )
    return Table("Environment", ["commit", "device", "versions", "data", "runs"], rows, words=4) if rows else None


def _name(analysis: Analysis, t: TrialRecord) -> str:
    if analysis.baseline is not None:
        return t.arm + (" (tuning)" if t.stage == "tune" else "")
    arm = f"{t.arm}: " if len(analysis.arms) > 1 else ""
    return arm + (", ".join(f"{k}={_setting(v)}" for k, v in t.params.items()) or "base")


def _size(value: float) -> str:
    return number(value) if value else "-"


def _mean(arm: ArmResult) -> str:
    if not arm.trials:
        return "-"
    return f"{arm.mean:.4f}" + ("" if math.isnan(arm.spread) else f" \u00b1 {arm.spread:.4f}")


def _setting(value: Any) -> str:
    return "" if value is None else number(value, 4) if isinstance(value, float) else str(value)


def _place(value: Any) -> float | str:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
