"""A stream of a million tokens on a CPU: state and memory do not grow; positions stay exact far beyond."""

import math

import mpmath
import pytest
import torch

from gecko_lab.components import state as states
from gecko_lab.components.rotary import tables
from gecko_lab.tasks import Subject
from gecko_lab.tasks.meter import resident


@pytest.mark.parametrize("start", [0, 2**20, 2**22 - 8, 2**31, 2**33])
def test_rotary_angles_are_exact(start: int) -> None:
    """cos and sin in float32 of the exact angle, to the rounding of float32."""
    base, width = 500_000.0, 16
    cos, sin = tables(start, 4, width, base, torch.device("cpu"))
    with mpmath.workdps(60):
        for i in range(4):
            for j in range(width // 2):
                angle = (start + i) * mpmath.mpf(base) ** (-mpmath.mpf(2 * j) / width)
                slack = 2**-24 + (start + i) * 2**-52  # the last rounding, and that of a float64 angle
                assert float(cos[i, j]) == pytest.approx(float(mpmath.cos(angle)), abs=slack)
                assert float(sin[i, j]) == pytest.approx(float(mpmath.sin(angle)), abs=slack)
    assert slack < 2**-22 or start > 2**22  # at four million it is still float32's own rounding


@pytest.mark.slow
def test_a_million_tokens_in_constant_memory(subject: Subject) -> None:
    total, piece = 2**20, 2**14
    random = torch.Generator().manual_seed(0)
    state, sizes, held, nats = None, set(), [], []
    for _ in range(total // piece):
        tokens = torch.randint(0, 256, (1, piece + 1), generator=random)
        features, state = subject.features(tokens[:, :-1], state, None)
        nats.append(float(subject.losses(features, tokens[:, 1:]).mean()))
        sizes.add(states.nbytes(state))
        held.append(resident())
    assert state is not None
    assert len(sizes) == 1
    assert state.blocks[0].attention.position == int(state.blocks[0].norm.count) == total
    assert state.blocks[0].norm.count.dtype == torch.int64
    half = len(held) // 2
    assert max(held[half:]) - max(held[:half]) < 8e6, held  # a thousandth of what keys and values of all would take
    assert math.isclose(sum(nats[-8:]) / 8, sum(nats[1:9]) / 8, abs_tol=0.05)  # noise stays noise: nothing drifts
