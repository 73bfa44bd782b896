"""One row of the table: make the case, check it, time it; what goes wrong becomes the row's error."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import backend as kernels
from .cases import Case, Job
from .clock import Ceilings, Timing, limit, measure
from .sizes import Size

BACKENDS = ("reference", "compiled", "cuda")
MODES = ("fwd", "fwd+bwd")
# Relative l2 distance between kernel and reference on rounded inputs. Blocks chain many roundings.
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-3}
TOLERANCE_WHOLE = {torch.bfloat16: 0.1, torch.float32: 2e-3}


@dataclass(frozen=True)
class Row:
    """A line of the results; times in ms, memory in GiB, None where there is none."""

    name: str
    shape: str
    mode: str
    backend: str
    ms: float | None
    ms_range: tuple[float, float] | None
    peak_gib: float | None
    floor_ms: float
    error: str | None


@dataclass
class Bench:
    """Where and how long rows are timed; remembers which kernels passed their check."""

    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    seconds: float
    repeats: int

    def __post_init__(self) -> None:
        self._checked: dict[tuple[str, str], str | None] = {}

    def row(self, case: Case, size: Size, mode: str, backend: str) -> Row:
        """Time one row. Never raises for what a case does; Ctrl-C ends the run."""
        forward, backward = zip(
            case.bytes(size, self.dtype.itemsize), case.flops(size, self.dtype.itemsize), strict=True
        )
        moved, flops = forward
        if mode == "fwd+bwd":
            moved, flops = moved + backward[0], flops + backward[1]
        floor = self.ceilings.floor_ms(moved, flops)
        timing: Timing | None = None
        error: str | None = None
        try:
            if backend == "cuda":
                error = self._check(case, size)
            if error is None:
                with kernels.use(_mode(case, backend)), limit(self.seconds):
                    timing = self._time(case, size, mode, compiled=backend == "compiled")
        except Exception as problem:
            error = describe(problem)
        self._clean(backend)
        head = (case.name, size.name, mode, backend)
        if timing is None:
            return Row(*head, None, None, None, floor, error)
        return Row(*head, timing.ms, timing.ms_range, timing.peak_gib, floor, None)

    def _time(self, case: Case, size: Size, mode: str, *, compiled: bool) -> Timing:
        torch.manual_seed(0)
        run = runner(case.make(size, self.device, self.dtype), mode, compiled=compiled)
        run()
        run()
        return measure(run, self.device, repeats=self.repeats, seconds=self.seconds / 4)

    def _check(self, case: Case, size: Size) -> str | None:
        """Why the kernels of a case are not timed at a size; None: they agree with the reference."""
        if self.device.type != "cuda":
            return "no CUDA device"
        key = (case.name, size.name)
        if key not in self._checked:
            try:
                with limit(self.seconds):
                    self._checked[key] = self._compare(case, size.reduced())
            except Exception as problem:
                self._checked[key] = f"check: {describe(problem)}"
            self._clean("cuda")
        return self._checked[key]

    def _compare(self, case: Case, size: Size) -> str | None:
        torch.manual_seed(0)
        job = case.make(size, self.device, self.dtype)
        with kernels.use(_mode(case, "cuda")):
            got = results(job)
        with kernels.use("reference"):
            if not job.inputs + job.parameters:  # a stream, which the call has moved on
                torch.manual_seed(0)
                job = case.make(size, self.device, self.dtype)
            # The reference of an operation runs in float32; a block holds its weights in the activations' dtype.
            wanted = results(job if case.whole else Job(job.call, tuple(_widen(x) for x in job.inputs)))
        limits = TOLERANCE_WHOLE if case.whole else TOLERANCE
        error = distance(got, wanted, together=case.whole)
        if error <= limits[self.dtype]:
            return None
        return f"check: {error:.2e} from the reference, more than {limits[self.dtype]:g}"

    def _clean(self, backend: str) -> None:
        if backend == "compiled":
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _mode(case: Case, backend: str) -> str:
    if backend != "cuda":
        return "reference"
    return "auto" if case.whole else "strict"


def _widen(leaf: Tensor) -> Tensor:
    wide = leaf.detach() if leaf.is_complex() else leaf.detach().float()
    return wide.requires_grad_()


def describe(problem: Exception) -> str:
    """An exception in one line."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:300]


def runner(job: Job, mode: str, *, compiled: bool) -> Callable[[], object]:
    """A call without arguments that does the forward, or the forward and every gradient."""
    call = torch.compile(job.call) if compiled else job.call
    if mode == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return call(*job.inputs)

        return forward
    leaves, dys = job.inputs + job.parameters, list[Tensor]()

    def both() -> object:
        out = call(*job.inputs)
        if not dys:
            dys.extend(torch.randn_like(y) for y in out)
        return torch.autograd.grad(out, leaves, dys, allow_unused=True)

    return both


def results(job: Job) -> list[list[Tensor]]:
    """Outputs, and the gradients of a fixed weighting of them (none where nothing can be trained)."""
    out, leaves = job.call(*job.inputs), job.inputs + job.parameters
    random = torch.Generator().manual_seed(1)
    dys = [(torch.randint(-8, 9, y.shape, generator=random) / 8).to(y) for y in out]
    found = torch.autograd.grad(out, leaves, dys, allow_unused=True) if leaves else ()
    return [
        [y.detach() for y in out],
        [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)],
    ]


def distance(got: list[list[Tensor]], wanted: list[list[Tensor]], *, together: bool) -> float:
    """The largest relative l2 distance over tensors; ``together``: over all outputs, and over all gradients."""
    worst = 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        squares = [
            (float((a.to(b.dtype) - b).abs().double().square().sum()), float(b.abs().double().square().sum()))
            for a, b in zip(ours, theirs, strict=True)
        ]
        if together:
            squares = [(sum(error for error, _ in squares), sum(norm for _, norm in squares))]
        for error, norm in squares:
            ratio = (error / max(norm, 1e-30)) ** 0.5
            worst = ratio if ratio != ratio else max(worst, ratio)
            if worst != worst:
                return float("inf")
    return worst
