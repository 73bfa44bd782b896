"""Text to batches: tokenizers, corpora, token stores, packed and streamed batches with an exact position.

Light on purpose: the worker processes of ``gecko_lab.prepare`` import this package, so nothing here loads torch.
"""

from .errors import DataError
from .source import TokenSource
from .tokenizers import Tokenizer, load_tokenizer

__all__ = ["DataError", "TokenSource", "Tokenizer", "load_tokenizer"]
