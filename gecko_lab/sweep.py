"""Many runs that answer one question: ``python -m gecko_lab.sweep NAME|FILE.yaml [options] [overrides]``.

Nothing starts before every arm and every value was composed and built without memory. The same command again takes the
study up where it is; on another machine it adds a worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import LabError

STOPPED = 75  # as of a run that a signal ended: the same command goes on
EDITABLE = ("question", "metric", "direction", "seeds", "match", "tune_seed", "trials", "sampler", "pruner")
NESTED = ("budget", "sampler", "pruner", "tune")


@dataclass
class Launch:
    """How a study is run; nothing here changes what it asks."""

    name: str = ""  # of the study; the sweep's name and variant
    variant: str = "auto"  # cpu or gpu; auto: gpu where there is one
    folder: str = "studies"  # runs and journal go to FOLDER/NAME
    storage: str = ""  # URL of a database; empty: FOLDER/NAME/journal.log
    workers: int = 0  # trials at once; 0: one a device
    devices: str = ""  # GPUs to use, such as 0,1; empty: all that are visible
    patience: float = 90.0  # seconds without a sign of life after which another machine's worker is taken for dead
    allow_code_change: bool = False  # join a study that began with other code
    retry_failed: bool = False  # do the trials again that failed for good
    dry_run: bool = False  # only check and print the plan


def parse(arguments: list[str]) -> tuple[Launch, dict[str, Any], list[str], list[str]]:
    """(how to run, fields of the sweep, names of arms, overrides of the runs) of the command line."""
    from .studies.sweepfile import value

    launch, options, arms, overrides = Launch(), {}, [], []
    types = {f.name: type(f.default) for f in fields(Launch)}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        head, _, tail = key.partition(".")
        if not equals:
            raise LabError(f"{argument}: cannot be read; write OPTION=VALUE or FIELD=VALUE")
        if key in types:
            setattr(launch, key, _convert(key, text, types[key]))
        elif key == "arms":
            arms = text.strip("[]").split(",")
        elif key == "seeds":
            options[key] = value(f"[{text.strip('[]')}]")
        elif key in EDITABLE:
            options[key] = value(text)
        elif head in NESTED and tail:
            nested = options.setdefault(head, {})
            if isinstance(nested, str):
                nested = options[head] = {"name": nested}
            nested[tail] = text if head == "tune" else value(text)
        else:
            overrides.append(argument)
    return launch, options, arms, overrides


def _convert(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise LabError(f"{key}={text}: must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise LabError(f"{key}={text}: must be a number") from error


def run(arguments: list[str]) -> int:
    """Check, join or begin the study, and work on it until it is done."""
    from .studies import arms as arm_sizes
    from .studies import sweepfile
    from .studies.ledger import Ledger, make_pruner, make_sampler
    from .studies.records import load_study
    from .studies.storage import JOURNAL, open_storage
    from .studies.study import join, known_arms, note_folder

    title, content = sweepfile.read(arguments[0])
    launch, options, chosen, overrides = parse(arguments[1:])
    devices = _devices(launch)
    variant = _variant(launch, content, devices)
    sweep = sweepfile.make_sweep(content, variant, options, overrides)
    if chosen:
        unknown = [arm for arm in chosen if arm not in sweep.arms]
        if unknown:
            raise LabError(f"arms={','.join(chosen)}: unknown {', '.join(unknown)}; there are {', '.join(sweep.arms)}")
        sweep.arms = {name: sweep.arms[name] for name in sweep.arms if name in chosen}
    make_sampler(sweep, 0), make_pruner(sweep)
    name = launch.name or (f"{title}-{variant}" if variant else title)
    folder = Path(launch.folder) / name
    exists = bool(launch.storage) or (folder / JOURNAL).exists()
    known = known_arms(open_storage(launch.storage or folder), name) if exists else []
    prepared = known or arm_sizes.prepare(sweep)
    if not launch.dry_run:
        storage = open_storage(launch.storage or folder, create=True)
        sweep, prepared = join(storage, name, sweep, prepared, folder, allow_code_change=launch.allow_code_change)
    _introduce(name, sweep, prepared)
    if launch.dry_run:
        return 0
    note_folder(folder, name, launch.storage or "journal.log")
    arms = {arm.name: arm.overrides for arm in prepared}
    workers = launch.workers or max(1, len(devices))
    ledgers = [Ledger(storage, name, sweep, arms, patience=launch.patience) for _ in range(workers)]
    ledgers[0].reap(ledgers[0].trials())
    ledgers[0].fill(ledgers[0].trials(), failed=launch.retry_failed)
    stopped = _work(ledgers, folder, devices)
    return _conclude(load_study(storage, name), folder, stopped)


def _devices(launch: Launch) -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if launch.variant == "cpu":
        return []
    if launch.devices:
        return launch.devices.split(",")
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _variant(launch: Launch, content: dict[str, Any], devices: list[str]) -> str:
    """cpu or gpu; empty where the sweep makes no difference."""
    if launch.variant not in ("auto", "cpu", "gpu"):
        raise LabError(f"variant={launch.variant}: must be auto, cpu or gpu")
    if launch.variant != "auto":
        return launch.variant
    return ("gpu" if devices else "cpu") if "cpu" in content or "gpu" in content else ""


def _introduce(name: str, sweep: Any, arms: list[Any]) -> None:
    from rich.console import Console

    from .studies.plan import slots

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"study     {name}: {sweep.question or 'no question given'}", markup=False)
    count = len(slots(sweep, [arm.name for arm in arms], []))
    later = f" to tune, then {len(arms) * len(sweep.seeds)}" if sweep.tune else ""
    console.print(f"asks      {sweep.metric}, {sweep.direction}; {sweep.kind}, {count} trials{later}", markup=False)
    first = next((arm for arm in arms if arm.name == "baseline"), arms[0])
    for arm in arms:
        off = f"{arm.parameters / first.parameters - 1:+.2%} parameters, "
        off += f"{arm.flops_per_token / first.flops_per_token - 1:+.2%} FLOPs"
        size = f"{arm.parameters:,} parameters, {arm.flops_per_token:.3g} forward FLOPs a token"
        matched = f", matched in {sweep.match}" if sweep.match != "none" else ""
        compared = "" if arm is first else f" ({off} against {first.name}{matched})"
        console.print(f"arm       {arm.name}: {' '.join(arm.overrides) or 'no change'}: {size}{compared}", markup=False)


def _work(ledgers: list[Any], folder: Path, devices: list[str]) -> bool:
    """Run the workers, with a live table; whether they were stopped before the end. Raises what a worker raised."""
    from .studies.code import fingerprint
    from .studies.watch import watch
    from .studies.worker import Process, work

    stop, errors, code, sweep = threading.Event(), list[Exception](), fingerprint(), ledgers[0].sweep
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def job(index: int) -> None:
        device = devices[index % len(devices)] if devices else None
        process = Process(folder, sweep.metric, sweep.budget, device, max(1, cores // len(ledgers)))
        try:
            work(ledgers[index], process, stop, code=code)
        except Exception as error:
            errors.append(error)
            stop.set()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print("\nstopping: trials in progress are told to stop and queued again", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = [threading.Thread(target=job, args=(i,), daemon=True) for i in range(len(ledgers))]
    try:
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        watch(ledgers[0].storage, ledgers[0].name, threads)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if errors:
        raise errors[0]
    return stop.is_set()


def _conclude(record: Any, folder: Path, stopped: bool) -> int:
    from rich.console import Console

    from .studies.records import steps_spent
    from .studies.table import STYLES, best_line

    console = Console(soft_wrap=True, highlight=False)
    counts = {state: sum(t.state == state for t in record.trials) for state in STYLES}
    spent = steps_spent(record)
    saved = "" if spent is None else f"; {spent:.0%} of the steps that all to the end would take"
    console.print("trials    " + ", ".join(f"{n} {state}" for state, n in counts.items() if n) + saved)
    if line := best_line(record):
        console.print(line, markup=False)
    console.print(f"runs      {folder / 'runs'}")
    if stopped:
        console.print("Stopped. The same command goes on.")
        return STOPPED
    console.print(f"report    python -m gecko_lab.report {folder}")
    return 0 if counts["complete"] else 1


def main() -> int:
    """Entry point of ``python -m gecko_lab.sweep``."""
    from . import cli

    arguments = sys.argv[1:]
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        from .studies.usage import usage

        usage(Launch, EDITABLE, NESTED)
        return 0 if arguments else cli.USER_ERROR
    return cli.guarded(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
