"""A sweep file and the command line over it, as one checked description of a study."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..components.registry import nearest
from ..errors import LabError
from .space import Dimension, dimension, parse

METRICS = {  # names of a run's validation records, and which direction is better
    "val/bits_per_byte": "minimize",
    "val/loss": "minimize",
    "val/perplexity": "minimize",
    "val/accuracy": "maximize",  # only of data that asks for answers
}
BUDGETS = ("steps", "tokens", "flops", "seconds")
CHOICES = {
    "kind": ("search", "ablation"),
    "metric": tuple(METRICS),
    "direction": ("minimize", "maximize"),
    "match": ("none", "parameters", "flops"),
}
SAMPLERS, PRUNERS = ("tpe", "random", "grid"), ("none", "median", "halving", "hyperband")
VARIANTS = ("cpu", "gpu")


@dataclass
class Sweep:
    """What a study asks. An ablation runs every arm with every seed; a search draws ``trials`` points for every arm."""

    kind: str
    question: str = ""
    metric: str = "val/bits_per_byte"
    direction: str = "minimize"  # a file's default: the metric's own
    base: list[str] = field(default_factory=list)
    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    space: dict[str, str] = field(default_factory=dict)
    match: str = "none"
    tune: dict[str, str] = field(default_factory=dict)  # ablation: chosen for each arm, on tune_seed, before the seeds
    tune_seed: int = 1000
    sampler: dict[str, Any] = field(default_factory=lambda: {"name": "tpe"})
    pruner: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    budget: dict[str, float] = field(default_factory=dict)
    trials: int = 20

    def dimensions(self) -> list[Dimension]:
        return [dimension(key, text) for key, text in (self.space if self.kind == "search" else self.tune).items()]


GROWING = ("trials", "seeds")  # may change when a study is taken up again
FIELDS = [f.name for f in dataclasses.fields(Sweep)]


def shipped() -> list[str]:
    """Names of the sweeps that come with the package."""
    folder = resources.files("gecko_lab.sweeps")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(name: str) -> tuple[str, dict[str, Any]]:
    """(name, content) of a shipped sweep or of a file."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise LabError(f"{name}: no such file")
        title, text = path.stem, path.read_text()
    elif name in shipped():
        title, text = name, resources.files("gecko_lab.sweeps").joinpath(f"{name}.yaml").read_text()
    else:
        raise LabError(f"unknown sweep {name!r}. {nearest(name, shipped())} Or give a .yaml file.")
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise LabError(f"{name}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise LabError(f"{name}: a sweep file is a mapping with kind, question, space or arms, ...")
    return title, {str(key): field for key, field in content.items()}


def value(text: str) -> Any:
    """One value as YAML writes it; LabError for what is none."""
    try:
        return OmegaConf.to_container(OmegaConf.create("value: " + text))["value"]  # type: ignore[index, call-overload]
    except (YAMLError, OmegaConfBaseException, KeyError) as error:
        raise LabError(f"{text}: cannot be read as a value") from error


def make_sweep(content: dict[str, Any], variant: str, options: dict[str, Any], overrides: list[str]) -> Sweep:
    """The file, its variant, then options (its fields) and overrides of the command line; LabError if it is wrong.

    An override with one value joins ``base``; one with several becomes a dimension of the space.
    """
    merged: dict[str, Any] = {k: v for k, v in content.items() if k not in VARIANTS}
    layer = content.get(variant) or {}
    for part, where in ((merged, "the sweep"), (layer, f"its variant {variant}")):
        if not isinstance(part, dict):
            raise LabError(f"{where}: must be a mapping of the fields of a sweep")
        for key in part:
            if key not in FIELDS:
                raise LabError(f"unknown field {key!r} in {where}. {nearest(str(key), FIELDS)}")
    base = [*_strings("base", merged.get("base")), *_strings("base", layer.get("base"))]
    merged |= layer | options
    merged.setdefault("direction", METRICS.get(str(merged.get("metric")), "minimize"))
    if "kind" not in merged:
        raise LabError("kind: is missing; search or ablation")
    for key in ("sampler", "pruner"):
        if isinstance(merged.get(key), str):
            merged[key] = {"name": merged[key]}
    space = dict(merged.get("space") or {})
    for text in overrides:
        [one] = parse(text)
        if one.is_sweep_override():
            space[text.split("=", 1)[0]] = text.split("=", 1)[1]
        else:
            space.pop(text.split("=", 1)[0], None)
            base.append(text)
    sweep = Sweep(**(merged | {"base": base, "space": {k: str(v) for k, v in space.items()}}))
    sweep.tune = {k: str(v) for k, v in (sweep.tune or {}).items()}
    sweep.arms = {str(k): _strings(f"arms.{k}", v) for k, v in (sweep.arms or {}).items()}
    _check(sweep)
    return sweep


def _strings(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise LabError(f"{name}={value}: must be a list of overrides such as [model.dim=64]")
    return list(value)


def _check(sweep: Sweep) -> None:
    for name, allowed in CHOICES.items():
        _one_of(name, getattr(sweep, name), allowed)
    _one_of("sampler", sweep.sampler.get("name"), SAMPLERS)
    _one_of("pruner", sweep.pruner.get("name"), PRUNERS)
    if not isinstance(sweep.seeds, list) or not all(type(s) is int and s >= 0 for s in sweep.seeds):
        raise LabError(f"seeds={sweep.seeds}: must be a list of integers, such as 0,1,2")
    if not sweep.seeds or len(set(sweep.seeds)) != len(sweep.seeds):
        raise LabError(f"seeds={sweep.seeds}: the study would have no trial, or one twice; name each seed once")
    if type(sweep.trials) is not int or sweep.trials < 1:
        raise LabError(f"trials={sweep.trials}: the study would have no trial; give an integer of at least 1")
    if len(sweep.budget) > 1 or any(k not in BUDGETS for k in sweep.budget):
        raise LabError(f"budget={sweep.budget}: one of " + ", ".join(f"budget.{b}=N" for b in BUDGETS))
    for name, value in sweep.budget.items():
        if not isinstance(value, int | float) or value <= 0:
            raise LabError(f"budget.{name}={value}: must be a positive number")
    (_check_search if sweep.kind == "search" else _check_ablation)(sweep)
    sweep.dimensions()


def _check_search(sweep: Sweep) -> None:
    if not sweep.space:
        raise LabError("space: is empty, so the search yields no trial; e.g. optim.lr=interval(1e-4,3e-3)")
    if len(sweep.seeds) != 1:
        raise LabError(f"seeds={sweep.seeds}: a search has one; an ablation study compares over several")
    if sweep.match != "none":
        raise LabError(f"match={sweep.match}: is for ablation studies, whose arms are compared with a baseline")
    if sweep.tune:
        raise LabError("tune: is for ablation studies; a search tunes what stands in space")
    if sweep.arms and sweep.pruner["name"] == "hyperband":
        raise LabError("pruner=hyperband: compares trials of all arms; with arms use median or halving")


def _check_ablation(sweep: Sweep) -> None:
    if sweep.space:
        raise LabError(
            f"space={sweep.space}: an ablation study has arms; give these values as arms, or as tune "
            "(chosen for each arm before its seeds run)"
        )
    if "baseline" not in sweep.arms:
        raise LabError("arms: an ablation study needs an arm named baseline, such as baseline: []")
    if sweep.pruner["name"] != "none":
        raise LabError(f"pruner={sweep.pruner['name']}: an ablation study runs every trial to its end; use none")
    if sweep.tune_seed in sweep.seeds:
        raise LabError(f"tune_seed={sweep.tune_seed}: must not be one of the seeds that are compared")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise LabError(f"{name}={value}: must be one of {', '.join(allowed)}")
