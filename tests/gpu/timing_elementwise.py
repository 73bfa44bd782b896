"""Times the gates and the views at the 7B layer's sizes: `python tests/gpu/timing_elementwise.py`. Needs a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from gecko_lab.bench.clock import measure
from gecko_lab.kernels.gates import cuda as gates
from gecko_lab.kernels.z_views import cuda as views


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the GPU, in ms."""
    for _ in range(3):
        run()
    return measure(run, torch.device("cuda", torch.cuda.current_device()), repeats=20, seconds=2.0).ms


def report(
    name: str, call: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor], forward: int, backward: int
) -> None:
    """`forward` and `backward` are the bytes that must move."""
    with torch.no_grad():
        time = milliseconds(call)
    out = call()
    dys = [torch.randn_like(y) for y in out]
    back = milliseconds(lambda: torch.autograd.grad(out, inputs, dys, retain_graph=True))
    print(f"{name:10} forward {time:.4f} ms {forward / time / 1e9:.2f} TB/s   "
          f"backward {back:.4f} ms {backward / back / 1e9:.2f} TB/s")  # fmt: skip


def copy_rate() -> float:
    """TB/s, read and write, of a large device copy."""
    source = torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9


def main() -> None:
    """Print a line an operation: time and bandwidth."""
    tokens, value_dim, ffn_dim, z_dim = 32768, 8192, 8192, 1024
    options = {"device": "cuda", "dtype": torch.bfloat16}
    print(f"copy {copy_rate():.2f} TB/s")
    near, r, far = (torch.randn(1, tokens, value_dim, requires_grad=True, **options) for _ in range(3))
    size = near.nbytes
    report("silu", lambda: (gates.silu(r),), [r], 2 * size, 3 * size)
    report("gate", lambda: (gates.gate(near, r, far),), [near, r, far], 4 * size, 5 * size)
    a, b = (torch.randn(1, tokens, ffn_dim, requires_grad=True, **options) for _ in range(2))
    report("swiglu", lambda: (gates.swiglu(a, b),), [a, b], 3 * a.nbytes, 5 * a.nbytes)
    both = torch.randn(1, tokens, 2 * ffn_dim, **options)
    halves = [x.detach().requires_grad_() for x in both.chunk(2, -1)]
    report("halves", lambda: (gates.swiglu(*halves),), halves, 3 * a.nbytes, 5 * a.nbytes)
    z = torch.randn(1, tokens, z_dim, requires_grad=True, **options)
    gamma, beta = (torch.zeros(4, z_dim, device="cuda", requires_grad=True) for _ in range(2))
    turns = torch.rand(tokens, 128, device="cuda")
    cos, sin = turns.cos(), turns.sin()
    moved = z.nbytes * 5 + 2 * cos.nbytes
    report("z_views", lambda: views.z_views(z, gamma, beta, cos, sin, heads=4, rope_heads=4), [z, gamma, beta],
           moved, moved + z.nbytes)  # fmt: skip


if __name__ == "__main__":
    main()
