"""The progress bar: what it shows, and that it seldom waits for a GPU."""

from types import SimpleNamespace

import pytest
import torch

from gecko_lab import progress


class OnGPU:
    """A loss on a GPU, which counts how often it is read."""

    is_cuda, reads = True, 0

    def __float__(self) -> float:
        self.reads += 1
        return 2.0


@pytest.fixture
def trainer() -> SimpleNamespace:
    return SimpleNamespace(progress_bar_metrics={"val/loss": 1.5}, loggers=[])


def test_the_last_loss_and_the_last_validation(trainer: SimpleNamespace) -> None:
    bar = progress.ProgressBar()
    assert bar.get_metrics(trainer, SimpleNamespace(last_loss=None)) == {"val/loss": 1.5}
    for loss in (2.0, 1.0):
        shown = bar.get_metrics(trainer, SimpleNamespace(last_loss=torch.tensor(loss)))
        assert shown == {"loss": f"{loss:.3f}", "val/loss": 1.5}


def test_a_loss_on_a_gpu_is_read_once_a_second(trainer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar, module = progress.ProgressBar(), SimpleNamespace(last_loss=OnGPU())
    for now[0] in (10.0, 10.5, 10.9, 11.1, 11.2):
        assert bar.get_metrics(trainer, module) == {"loss": "2.000", "val/loss": 1.5}
    assert module.last_loss.reads == 2
