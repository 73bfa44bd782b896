"""Search spaces in the command line's own grammar: ``interval``, ``range``, ``choice`` and comma lists of Hydra.

    optim.lr: tag(log, interval(1e-4, 3e-3))     a real number, uniform in its logarithm
    model.num_layers: int(interval(2, 8))        an integer, both ends included
    model.chunk_size: 32,64,128                  one of these
    model: choice(gecko, llama)
    optim.beta2: range(0.9, 0.99, 0.03)          a grid, the end not included
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from ..errors import LabError


@dataclass(frozen=True)
class Dimension:
    """One override that varies. ``values`` lists a finite one and is empty for an interval."""

    key: str
    distribution: BaseDistribution
    values: tuple[Any, ...]

    def suggest(self, trial: Trial) -> Any:
        return trial._suggest(self.key, self.distribution)

    def ends(self) -> list[Any]:
        """Values that a check tries: all of a finite one, else both ends."""
        d = self.distribution
        return list(self.values) or [d.low, d.high]  # type: ignore[attr-defined]


def parse(text: str) -> list[Override]:
    """Overrides of one argument; LabError for what the grammar does not know."""
    try:
        return OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise LabError(f"cannot read {text!r}: {str(error).splitlines()[0]}") from error


def dimension(key: str, text: Any) -> Dimension:
    """The dimension that ``key=text`` describes; LabError when it yields no value."""
    [override] = parse(f"{key}={text}")
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return Dimension(key, _interval(f"space.{key}={text}", sweep), ())
    if isinstance(sweep, Glob):
        raise LabError(f"space.{key}={text}: glob is not for studies; list the names")
    if not override.is_sweep_override():
        raise LabError(f"space.{key}={text}: is one value, not a space; give a list, interval or range, or use base")
    values = tuple(_number(v) for v in override.sweep_string_iterator()) if override.is_discrete_sweep() else ()
    if not values:
        raise LabError(f"space.{key}={text}: yields no value")
    if len(set(values)) != len(values):
        raise LabError(f"space.{key}={text}: names a value twice")
    if isinstance(sweep, RangeSweep) and all(isinstance(v, int) for v in values) and sorted(values) == list(values):
        step = values[1] - values[0] if len(values) > 1 else 1
        return Dimension(key, IntDistribution(values[0], values[-1], step=step), values)
    return Dimension(key, CategoricalDistribution(values), values)


def _interval(name: str, sweep: IntervalSweep) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    log = "log" in sweep.tags
    if low is None or high is None or not low < high:
        raise LabError(f"{name}: yields no value; the first end must be below the second")
    if unknown := sweep.tags - {"log"}:
        raise LabError(f"{name}: unknown tag {', '.join(sorted(unknown))}; the only one is log")
    if log and low <= 0:
        raise LabError(f"{name}: a logarithmic interval begins above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _number(text: str) -> Any:
    """Numbers as numbers, so that a report can order them; everything else as the text of the override."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text


def grid(dimensions: list[Dimension]) -> list[dict[str, Any]]:
    """Every combination; LabError when a dimension is an interval."""
    for d in dimensions:
        if not d.values:
            raise LabError(f"space.{d.key}: an interval has no grid; give a list or a range, or another sampler")
    return [dict(zip([d.key for d in dimensions], v)) for v in itertools.product(*(d.values for d in dimensions))]


def overrides(params: dict[str, Any]) -> list[str]:
    """Chosen values as overrides."""
    return [f"{key}={value}" for key, value in params.items()]
