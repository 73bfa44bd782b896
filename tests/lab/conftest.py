"""What several tests of the lab share."""

from pathlib import Path

import pytest
from trained import make_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run folder of two steps, and the numbers of its final validation."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", make_run(folder)
