"""Feed-forward layers: swiglu, mlp. Their norm is inside, the residual is the block's."""

from . import mlp, swiglu

__all__ = ["mlp", "swiglu"]
