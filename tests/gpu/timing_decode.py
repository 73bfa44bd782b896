"""Where a step of decoding spends its time: the whole step, its launches early and plain, each kernel.

python -m tests.gpu.timing_decode     (4 layers of the 7B shape in bf16, after 4096 tokens)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gecko_lab.bench.cases import _gecko
from gecko_lab.bench.sizes import SIZES
from gecko_lab.components import state as states
from gecko_lab.decoder import Decoder
from gecko_lab.kernels import backend

AHEAD = 20_000_000  # cycles that the GPU waits while Python enqueues


def milliseconds(work: Callable[[], object], count: int = 50) -> float:
    """Of one call, the mean over ``count`` that follow each other."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def main() -> None:
    """Print the table; a kernel alone is launched for all layers in turn, so that its weights are not in L2."""
    device = torch.device("cuda", torch.cuda.current_device())
    print(torch.cuda.get_device_name(device))
    torch.manual_seed(0)
    size = SIZES["7b-b1-l4096"]
    model = _gecko(size, size.layers, device, torch.bfloat16).eval()
    with torch.no_grad():
        _, state = model.features(torch.randint(size.vocab_size, (1, size.length), device=device))
    for batch in (1, 4, 8, 16):
        rows = states.map_tensors(lambda t, b=batch: t.expand(b, *t.shape[1:]).contiguous(), state)
        with backend.use("strict"):
            decoder = Decoder(model, rows, batch)
        tokens, step = torch.randint(size.vocab_size, (batch,), device=device), decoder._graph
        assert step is not None
        print(f"B={batch}: step {milliseconds(lambda d=decoder, t=tokens: d.step(t)):.4f} ms", end="")
        launches, index = step.chain._launches, step.chain.device_index
        for step.chain.early in (True, False):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step.chain.run()
            print(f", {'early' if step.chain.early else 'plain'} launches {milliseconds(graph.replay):.4f}", end="")
        print()
        for name in dict.fromkeys(kernel.name for kernel, *_ in launches):
            mine = [launch for launch in launches if launch[0].name == name]

            def alone(found: list = mine, index: int = index) -> None:
                for kernel, grid, values, smem in found:
                    kernel.launch(index, grid, *values, smem=smem)

            print(f"  {name:12s} {1e3 * milliseconds(alone, 10) / len(mine):8.2f} us x {len(mine)}")


if __name__ == "__main__":
    main()
