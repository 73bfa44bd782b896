"""Times of the norms on this GPU: `python tests/gpu/timing_norms.py`. Medians of CUDA events in ms, launches hidden,
beside the floor of their bytes at the speed of a device copy measured in the same run."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gecko_lab.kernels import ops
from gecko_lab.kernels.backend import use

SHAPES = {"7b-b1-l32768": (1, 32768, 4096), "7b-b8-l4096": (8, 4096, 4096), "1b-b1-l32768": (1, 32768, 2048)}
DECAY = {"groups": 64, "beta1": 0.999, "beta2": 0.9999, "eps": 1e-5}


def median(call: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches are queued
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def both(call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward alone and of forward and backward."""
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x), [x, *parameters], dy)

    return median(forward), median(train)


def copy_speed(device: torch.device) -> float:
    """GB/s of a device copy, reads and writes."""
    source = torch.randn(1 << 28, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * source.numel() / median(lambda: target.copy_(source)) / 1e6


def main() -> None:
    device = torch.device("cuda")
    speed = copy_speed(device)
    print(f"{torch.cuda.get_device_name()}, copy {speed:.0f} GB/s")
    print(f"{'op':<34}{'shape':<16}{'fwd':>8}{'floor':>8}{'fwd+bwd':>10}{'floor':>8}")
    for name, (batch, length, dim) in SHAPES.items():
        x = torch.randn(batch, length, dim, device=device, dtype=torch.bfloat16).requires_grad_()
        weight, bias = (torch.zeros(dim, device=device, requires_grad=True) for _ in range(2))
        bos = torch.zeros(batch, length, dtype=torch.bool, device=device)
        bos[:, :: length // 7] = True
        decay = partial(ops.timestep_decay_norm, weight=weight, bias=bias, **DECAY)
        plain = partial(ops.timestep_norm, weight=weight, bias=bias, groups=64, eps=1e-5)
        cases: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
            "timestep_decay_norm": (lambda t, f=decay: f(t)[0], [weight, bias]),
            "timestep_decay_norm, documents": (lambda t, f=decay, b=bos: f(t, bos=b)[0], [weight, bias]),
            "timestep_norm": (lambda t, f=plain: f(t)[0], [weight, bias]),
            "rms_norm": (partial(ops.rms_norm, weight=weight), [weight]),
            "rms_norm, 256 a group": (partial(ops.rms_norm, weight=weight, groups=dim // 256), [weight]),
            "layer_norm": (partial(ops.layer_norm, weight=weight, bias=bias), [weight, bias]),
        }
        size = 2 * x.numel()
        for op, (call, parameters) in cases.items():
            forward, train = both(call, x, parameters)
            floors = 2 * size / speed / 1e6, 5 * size / speed / 1e6
            print(f"{op:<34}{name:<16}{forward:>8.3f}{floors[0]:>8.3f}{train:>10.3f}{floors[1]:>8.3f}", flush=True)
    token = torch.randn(1, 1, 4096, device=device, dtype=torch.bfloat16)
    weight, bias = (torch.zeros(4096, device=device) for _ in range(2))
    with torch.no_grad():
        _, state = ops.timestep_decay_norm(token, weight, bias, **DECAY)
        steps = median(lambda: ops.timestep_decay_norm(token, weight, bias, state=state, **DECAY), 200)
        rows = median(lambda: ops.rms_norm(token, weight), 200)
    print(f"one token, D=4096: timestep_decay_norm {steps:.4f}, rms_norm {rows:.4f}")


if __name__ == "__main__":
    with use("strict"):
        main()
