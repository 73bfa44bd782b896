"""Text from a model as a stream, in constant memory: reading, sampling, batches of prompts, sessions.

``read`` and ``generate`` work on tokens; ``Session`` is one stream with its text, that can be forked, rewound and
saved; ``Batch`` and ``answers`` continue many prompts side by side.
"""

from .batch import Answer, Batch, answers
from .reading import PIECE, Reader, read
from .sampling import Chooser, Sampling
from .session import Mark, Session
from .stream import generate
from .text import StopText, TextStream

__all__ = [
    "PIECE",
    "Answer",
    "Batch",
    "Chooser",
    "Mark",
    "Reader",
    "Sampling",
    "Session",
    "StopText",
    "TextStream",
    "answers",
    "generate",
    "read",
]
