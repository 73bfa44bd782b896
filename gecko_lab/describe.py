"""``python -m gecko_lab.describe model=... [overrides]``: what a stream of a model costs, before any training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .atlas import atlas, crossover
from .build import build_config, options
from .cli import guarded
from .errors import LabError

TEXT = """Parameters, FLOPs and the bytes of a stream's state, by component, of a model that is not built in memory.

A state is everything that reading on needs: for Llama the keys and values of all tokens, for Gecko a size that does not
depend on how much was read. The crossover is the length from which on the other model's state is the larger one."""
CONTEXTS = "2048,32768,1000000"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m gecko_lab.describe",
        description=TEXT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as for train: model=gecko_7b +ablation=no_awm model.dim=512"
    )
    p.add_argument("--context", default=CONTEXTS, metavar="L[,L]", help=f"lengths in tokens (default: {CONTEXTS})")
    p.add_argument(
        "--against",
        metavar="PRESET",
        help="the model to compare with (default: llama of the same size; none: no comparison)",
    )
    p.add_argument(
        "--dtype", default="bf16", choices=("bf16", "fp32"), help="of activations, keys and values (default: bf16)"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend."""
    options = parser().parse_intermixed_args(arguments)
    return guarded(lambda: _main(options))


def describe(
    *overrides: str, contexts: tuple[int, ...] = (2048, 32768, 1_000_000), against: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """The numbers of the command as plain values; ``against`` is a preset, None llama of the same size, or "none".

    ConfigError: names or sizes that no model can have. LabError: no such preset to compare with.
    """
    own = atlas(build_config(*overrides).model, contexts, dtype)
    preset = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("model=")), "gecko")
    other = _other(preset, against)
    facts: dict[str, Any] = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(own)}
    if other is not None:
        theirs = atlas(build_config(f"model={other}").model, contexts, dtype)
        facts["against"] = {"preset": other, **dataclasses.asdict(theirs), "crossover": crossover(own, theirs)}
    return facts


def _main(chosen: argparse.Namespace) -> int:
    try:
        contexts = tuple(int(part.replace("_", "")) for part in chosen.context.split(","))
    except ValueError:
        contexts = (0,)
    if min(contexts) < 1:
        raise LabError(f"--context {chosen.context}: must be lengths of at least 1, such as 2048 or 2048,32768")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen.dtype]
    facts = describe(*chosen.overrides, contexts=contexts, against=chosen.against, dtype=dtype)
    if chosen.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts, contexts)
    return 0


def _other(preset: str, against: str | None) -> str | None:
    """The preset to compare with."""
    presets = [name for name in options("model") if name != "none"]
    if against is not None:
        if against == "none":
            return None
        if against not in presets:
            from .components.registry import nearest

            raise LabError(f"--against {against}: no such preset. {nearest(against, presets)}")
        return against
    size = preset.partition("_")[2]
    name = f"llama_{size}" if size else "llama"
    return name if name in presets and name != preset else None


def _print(facts: dict[str, Any], contexts: tuple[int, ...]) -> None:
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    bits = {"bfloat16": "bf16", "float32": "fp32"}[facts["dtype"]]
    console.print(f"[bold]{facts['preset']}[/]: {facts['parameters']:,} parameters, {facts['layers']} layers, {bits}\n")
    table = Table(box=None, pad_edge=False, title="By component, all layers", title_justify="left")
    table.add_column("kind")
    table.add_column("component")
    numbers = [f"{what}\nat {context:,}" for what in ("FLOPs/token", "state") for context in contexts]
    for column in ("parameters", *numbers):
        table.add_column(column, justify="right")
    for part in [*facts["parts"], {**facts, "kind": "all", "name": ""}]:
        if part["kind"] == "all":
            table.add_section()
        table.add_row(
            part["kind"], part["name"], f"{part['parameters']:,}",
            *(_scaled(n) for n in part["flops"]), *(_bytes(n) for n in part["state"]),
        )  # fmt: skip
    console.print(table)
    window = "; ".join(f"{name}: {text}" for name, text in facts["windows"].items())
    console.print(f"\nattention sees        {window}")
    largest = facts["largest_state"]
    console.print(f"state at its largest  {'grows without end' if largest is None else _bytes(largest)}")
    other = facts.get("against")
    if other is None:
        return
    console.print(f"\n[bold]beside {other['preset']}[/]: {other['parameters']:,} parameters")
    table = Table(box=None, pad_edge=False)
    for name in ("context", facts["preset"], other["preset"], "ratio"):
        table.add_column(name, justify="right")
    for context, mine, theirs in zip(contexts, facts["state"], other["state"]):
        table.add_row(f"{context:,}", _bytes(mine), _bytes(theirs), f"{theirs / mine:,.2f}" if mine else "")
    console.print(table)
    if other["crossover"] is not None:
        console.print(f"from {other['crossover']:,} tokens on the state of {other['preset']} is the larger one")


def _scaled(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    return _scaled(number) + "B" if number >= 1e3 else f"{number:.0f} B"


if __name__ == "__main__":
    sys.exit(main())
