"""Feed-forward layers: swiglu, mlp. Their norm is inside, the residual is the block's."""

from .mlp import MLP
from .swiglu import SwiGLU

__all__ = [
    "MLP",
    "SwiGLU",
]
