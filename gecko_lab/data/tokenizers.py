"""Tokenizers behind one small interface: ``load_tokenizer("bytes" | "hf:FILE" | "spm:FILE" | "tiktoken:NAME")``."""

from __future__ import annotations

import base64
import hashlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>", "[CLS]")
# The cl100k pattern: what a bare .tiktoken rank file is most often used with; such a file carries none itself.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Tokenizer:
    """``encode`` gives the tokens of one document without BOS; BOS never comes out of text.

    ``byte_lengths`` (vocab_size,) int64 is the number of source bytes that a token stands for (0 for BOS and the
    other special tokens); ``prefix_bytes`` is what a document's first token counts too much (SentencePiece puts a
    space before the text). Their sum over a document equals its UTF-8 size unless the tokenizer normalises text.
    """

    name: str
    vocab_size: int
    bos_id: int
    fingerprint: str
    byte_lengths: np.ndarray
    prefix_bytes: int = 0
    file: Path | None = None

    def _encode(self, text: bytes) -> np.ndarray:
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        """The text of the tokens; special tokens give nothing, broken UTF-8 gives the replacement character."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every token of a text."""
        largest = max(token for token in (self.vocab_size - 1, self.vocab_size - 2) if token != self.bos_id)
        return np.dtype(np.min_scalar_type(max(largest, 0)))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens (T,) of one document, ``dtype``; bytes must be UTF-8."""
        ids = self._encode(text.encode() if isinstance(text, str) else text)
        if ids.dtype != np.uint8 and (ids == self.bos_id).any():
            raise DataError(f"tokenizer {self.name}: the text itself encodes to BOS (id {self.bos_id})")
        return ids

    def count_bytes(self, ids: Any) -> int:
        """Source bytes that a span of tokens stands for (not at the head of a document: see ``prefix_bytes``)."""
        return int(self.byte_lengths[np.asarray(ids, dtype=np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes, BOS is 256."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.bos_id = "bytes", 257, 256
        self.fingerprint = hashlib.sha256(b"bytes").hexdigest()
        self.byte_lengths = np.ones(257, dtype=np.int64)
        self.byte_lengths[256] = 0

    def _encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: Any) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizers`` JSON file."""

    def __init__(self, file: Path) -> None:
        data = _read(file)
        library = _need("tokenizers")
        try:
            self._model = library.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:
            raise DataError(f"{file}: not a tokenizers JSON file ({error})") from None
        self._model.encode_special_tokens = True  # the characters "<s>" in a text are text
        self._model.no_truncation()
        self._model.no_padding()
        self.name, self.file, self.fingerprint = f"hf:{file}", file, hashlib.sha256(data).hexdigest()
        special = {i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        known = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.vocab_size = _bos([self._model.token_to_id(name) for name in BOS_NAMES], known)
        added = set(self._model.get_added_tokens_decoder()) - special
        byte_level = '"ByteLevel"' in data.decode("utf-8")
        alphabet = _byte_alphabet()
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(known):
            piece = self._model.id_to_token(token)
            if piece is None or token in special or token == self.bos_id:
                continue
            plain = token in added or not byte_level or any(c not in alphabet for c in piece)
            self.byte_lengths[token] = _piece_bytes(piece) if plain else len(piece)
        first = self._model.encode("a", add_special_tokens=False).ids
        self.prefix_bytes = int(self.byte_lengths[first].sum()) - 1

    def _encode(self, text: bytes) -> np.ndarray:
        ids = self._model.encode(text.decode("utf-8"), add_special_tokens=False).ids
        return np.asarray(ids, dtype=self.dtype)

    def decode(self, ids: Any) -> str:
        return str(self._model.decode([int(i) for i in ids if int(i) != self.bos_id], skip_special_tokens=True))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    def __init__(self, file: Path) -> None:
        data = _read(file)
        library = _need("sentencepiece")
        try:
            self._model = library.SentencePieceProcessor(model_proto=data)
        except Exception as error:
            raise DataError(f"{file}: not a SentencePiece model ({error})") from None
        self.name, self.file, self.fingerprint = f"spm:{file}", file, hashlib.sha256(data).hexdigest()
        model = self._model
        known = model.get_piece_size()
        self.bos_id, self.vocab_size = _bos([model.bos_id() if model.bos_id() >= 0 else None], known)
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token in range(known):
            if not (model.is_control(token) or model.is_unused(token)):
                self.byte_lengths[token] = _piece_bytes(model.id_to_piece(token))
        self.prefix_bytes = int(self.byte_lengths[model.encode("a")].sum()) - 1

    def _encode(self, text: bytes) -> np.ndarray:
        return np.asarray(self._model.encode(text.decode("utf-8")), dtype=self.dtype)

    def decode(self, ids: Any) -> str:
        return str(self._model.decode([int(i) for i in ids if int(i) < self._model.get_piece_size()]))


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding by name, or a file of mergeable ranks (split with the cl100k pattern)."""

    def __init__(self, name: str) -> None:
        library = _need("tiktoken")
        self.name = f"tiktoken:{name}"
        if Path(name).is_file():
            self.file = Path(name)
            try:
                lines = [line.split() for line in _read(self.file).splitlines() if line]
                ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
                self._model = library.Encoding(name, pat_str=CL100K, mergeable_ranks=ranks, special_tokens={})
            except Exception as error:
                raise DataError(f"{name}: not a file of tiktoken ranks ({error})") from None
        else:
            try:
                self._model = library.get_encoding(name)
            except Exception as error:
                raise DataError(f"tiktoken:{name}: no such file, and no such encoding here ({error})") from None
        known = self._model.n_vocab
        self.bos_id, self.vocab_size = _bos([self._model._special_tokens.get("<|endoftext|>")], known)
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        digest = hashlib.sha256(self._model._pat_str.encode())
        for piece, rank in self._model._mergeable_ranks.items():
            self.byte_lengths[rank] = len(piece)
            digest.update(piece + rank.to_bytes(8, "little"))
        self.fingerprint = digest.hexdigest()

    def _encode(self, text: bytes) -> np.ndarray:
        return np.asarray(self._model.encode_ordinary(text.decode("utf-8")), dtype=self.dtype)

    def decode(self, ids: Any) -> str:
        return str(self._model.decode([int(i) for i in ids if self.byte_lengths[int(i)]]))


FILE_TOKENIZERS = {"hf": HuggingFaceTokenizer, "spm": SentencePieceTokenizer}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of this name; DataError when the name, the file or the optional package is not there."""
    kind, _, rest = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if kind in FILE_TOKENIZERS and rest:
        return FILE_TOKENIZERS[kind](Path(rest))
    if kind == "tiktoken" and rest:
        return TiktokenTokenizer(rest)
    raise DataError(f"tokenizer {name!r}: must be bytes, hf:FILE.json, spm:FILE.model or tiktoken:NAME|FILE")


def _bos(candidates: list[int | None], known: int) -> tuple[int, int]:
    """(bos_id, vocab_size): the first candidate that exists, else one id past the tokenizer's own."""
    for token in candidates:
        if token is not None:
            return token, known
    return known, known + 1


def _piece_bytes(piece: str) -> int:
    """Bytes of a piece in SentencePiece's writing: U+2581 is a space, <0x41> is one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("\u2581", " ").encode("utf-8"))


def _byte_alphabet() -> set[str]:
    """The 256 characters with which byte-level BPE writes bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b) for b in shown} | {chr(256 + i) for i in range(256 - len(shown))}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer file {file}: {error.strerror or error}") from None


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"this tokenizer needs the package {package}: pip install 'gecko-lab[data]'") from None
