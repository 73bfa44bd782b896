"""The command that measures what carrying the state costs."""

import json
from pathlib import Path

import pytest
import torch

from gecko_lab.bench import streaming


def test_unknown_operations_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        streaming.main(["--ops", "complex_ema,norm"])
    assert "norm: known are timestep_decay_norm, complex_ema" in capsys.readouterr().err


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert streaming.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_writes_what_it_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(streaming, "SHAPES", ((2, 1024),))
    monkeypatch.setattr(streaming, "TOKENS", 2048)
    out = tmp_path / "new" / "streaming.json"
    assert streaming.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["device"]
    assert found["command"].startswith("python -m gecko_lab.bench.streaming --out")
    assert [(row["name"], row["mode"]) for row in found["rows"]] == [
        (name, mode) for name in streaming.OPS for mode in ("fwd", "fwd+bwd")
    ]
    for row in found["rows"]:
        assert row["ratio"] == row["pieces_us"] / row["whole_us"]
