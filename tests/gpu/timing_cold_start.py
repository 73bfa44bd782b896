"""What an empty kernel cache costs: seconds until the end of the first training step, each in a fresh process.

python -m tests.gpu.timing_cold_start     (the parent starts itself with --step; nothing else should run)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

CASES = {
    "gecko_11m, 8 x 2,048 tokens": (8, 2048, ["model=gecko_11m"]),
    "one layer of the 7B shape, 1 x 8,192 tokens": (1, 8192, ["model=gecko_7b", "model.num_layers=1"]),
}


def step(batch: int, length: int, overrides: list[str]) -> None:
    """One training step, as a program that was just started."""
    import torch
    import torch.nn.functional as F

    import gecko_lab
    from gecko_lab.kernels.backend import use

    with torch.device("cuda"):
        model = gecko_lab.build_model(*overrides)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(200, (batch, length + 1), device="cuda")
    with use("strict"), torch.autocast("cuda", torch.bfloat16):
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    print(f"loss {float(loss.detach()):.3f}")


def seconds(cache: str, batch: int, length: int, overrides: list[str]) -> float:
    """From the start of a process to the end of its first step."""
    command = [sys.executable, "-m", "tests.gpu.timing_cold_start", "--step", str(batch), str(length), *overrides]
    start = time.perf_counter()
    subprocess.run(command, env={**os.environ, "GECKO_LAB_KERNEL_CACHE": cache}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    if (arguments := given.parse_args()).step:
        batch, length, *overrides = arguments.step
        step(int(batch), int(length), overrides)
        return
    print(f"{'first step of':46}{'cold s':>8}{'warm s':>8}{'more':>7}   compiled")
    for name, (batch, length, overrides) in CASES.items():
        with tempfile.TemporaryDirectory() as cache:
            cold = seconds(cache, batch, length, overrides)
            count = len(os.listdir(cache))
            warm = seconds(cache, batch, length, overrides)
        print(f"{name:46}{cold:>8.1f}{warm:>8.1f}{cold - warm:>7.1f}   {count} modules", flush=True)


if __name__ == "__main__":
    main()
