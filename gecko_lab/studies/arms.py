"""Arms before they run: every one is composed and built without memory, matched in size, and its length set."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .. import build
from ..config import TrainConfig
from ..errors import LabError
from ..model import LanguageModel
from ..telemetry.flops import TRAINING, flops_per_token
from .records import Arm
from .space import overrides
from .sweepfile import Sweep

MULTIPLE = 8  # of the feed-forward's width: what matrix units like


def prepare(sweep: Sweep) -> list[Arm]:
    """The study's arms, matched as the sweep asks. Raises LabError naming the arm or value that cannot be built."""
    arms = [measure(sweep, name, changes) for name, changes in (sweep.arms or {"search": []}).items()]
    for arm in arms:
        _check_space(sweep, arm)
    if sweep.match != "none":
        arms = _match(sweep, arms)
    return arms


def measure(sweep: Sweep, name: str, changes: list[str]) -> Arm:
    """Parameters and forward FLOPs a token of an arm."""
    try:
        config, model = built([*sweep.base, *changes, *overrides(_first(sweep))])
        if config.trainer.devices * config.trainer.num_nodes != 1:
            raise LabError("trainer.devices: a trial has one device; run more of them with workers=N devices=0,1")
        steps(sweep.budget, config, model)
    except ValueError as error:
        raise LabError(f"arm {name} ({' '.join(changes) or 'no change'}): {error}") from error
    flops = flops_per_token(model, config.data.seq_len)
    return Arm(name, changes, model.num_parameters(), flops)


def built(changes: list[str]) -> tuple[TrainConfig, LanguageModel]:
    """A checked configuration and its model without memory."""
    config = build.build_config(*changes)
    config.data.check()
    with torch.device("meta"):
        return config, LanguageModel(config.model)


def steps(budget: dict[str, float], config: TrainConfig, model: LanguageModel) -> int:
    """Optimiser steps that a trial's budget buys; with seconds, ``trainer.max_steps`` stays: the schedule's length."""
    trainer = config.trainer
    tokens = trainer.batch_size * trainer.accumulate * config.data.seq_len
    [(kind, amount)] = budget.items() or [("seconds", 0)]
    if kind == "seconds":
        return trainer.max_steps
    flops = TRAINING * flops_per_token(model, config.data.seq_len) * tokens
    count = math.floor(amount / {"steps": 1, "tokens": tokens, "flops": flops}[kind])
    if count < 1:
        raise LabError(f"budget.{kind}={amount:g}: is less than one step of {tokens} tokens")
    return count


def _first(sweep: Sweep) -> dict[str, object]:
    """A point of the space to measure an arm at: where a size varies, there is no one size."""
    return {d.key: d.ends()[0] for d in sweep.dimensions()}


def _check_space(sweep: Sweep, arm: Arm) -> None:
    """Build each value of each dimension once, the others at their first."""
    first = _first(sweep)
    for d in sweep.dimensions():
        for value in d.ends()[1:]:
            point = overrides({**first, d.key: value})
            try:
                built([*sweep.base, *arm.overrides, *point])
            except ValueError as error:
                raise LabError(f"arm {arm.name} with {d.key}={value}: {error}") from error


def _match(sweep: Sweep, arms: list[Arm]) -> list[Arm]:
    """Each arm with the feed-forward width at which its size is nearest to the baseline's.

    Parameters and FLOPs both grow by the same amount with each feature of the width.
    """
    size: Callable[[Arm], float] = lambda arm: arm.parameters if sweep.match == "parameters" else arm.flops_per_token
    target = size(next(arm for arm in arms if arm.name == "baseline"))

    def at(arm: Arm, width: int) -> Arm:
        kept = [o for o in arm.overrides if not o.startswith("model.ffn_dim=")]
        return measure(sweep, arm.name, [*kept, f"model.ffn_dim={width}"])

    matched = []
    for arm in arms:
        if size(arm) == target:
            matched.append(arm)
            continue
        config, _ = built([*sweep.base, *arm.overrides, *overrides(_first(sweep))])
        width = config.model.ffn_dim
        slope = (size(at(arm, width + MULTIPLE)) - size(arm)) / MULTIPLE
        wanted = width + (target - size(arm)) / slope
        below = max(MULTIPLE, math.floor(wanted / MULTIPLE) * MULTIPLE)
        choices = [arm, at(arm, below), at(arm, below + MULTIPLE)]
        matched.append(min(choices, key=lambda a: abs(size(a) - target)))
    return matched
