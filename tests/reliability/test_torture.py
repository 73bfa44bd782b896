"""A small round of torture.py; docs/reliability.md has the long one."""

import os
import subprocess
import sys
from pathlib import Path


def test_eight_kills_lose_nothing() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.torture", "--kills", "8", "--seed", "3"],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills, nothing lost" in done.stdout
