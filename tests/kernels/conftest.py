"""Every test of the kernels compiles into a cache of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that this test alone uses."""
    folder = tmp_path / "kernel_cache"
    monkeypatch.setenv("GECKO_LAB_KERNEL_CACHE", str(folder))
    return folder
