"""What a run records of itself: curves, norms, probes, speed (docs/telemetry.md)."""

from .recorder import Recorder

__all__ = ["Recorder"]
