"""The named shapes at which everything is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """Sizes of one layer and of its input; letters as in docs/architecture.md.

    ``llama_heads`` and ``llama_ffn_dim`` are those of the Llama-2 block of the same width; ``layers`` and
    ``vocab_size`` those of the models, cut in depth so that training fits one GPU.
    """

    name: str
    batch: int
    length: int
    dim: int
    z_dim: int
    value_dim: int
    heads: int
    ffn_dim: int
    modes: int
    groups: int
    chunk: int
    llama_heads: int
    llama_ffn_dim: int
    layers: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        """B L."""
        return self.batch * self.length

    @property
    def head_dim(self) -> int:
        """S, key features of a head."""
        return self.z_dim // self.heads

    @property
    def value_head_dim(self) -> int:
        """E, value features of a head."""
        return self.value_dim // self.heads

    def reduced(self) -> Size:
        """The same layer on a short input with several chunks: what the quick check of a kernel runs."""
        chunk = min(self.chunk, 128)
        return replace(self, batch=min(self.batch, 2), length=min(self.length, 3 * chunk + 17), chunk=chunk)


def packed(size: Size) -> int:
    """Tokens of each of the documents that the baselines' attention is timed with: a chunk and a half."""
    return size.chunk * 3 // 2


_7B = Size("7b", 1, 32768, 4096, 1024, 8192, 4, 8192, 16, 64, 2048, 32, 11008, 4, 32000)
_1B = Size("1b", 1, 32768, 2048, 512, 4096, 2, 5632, 16, 64, 2048, 16, 5632, 8, 32000)
_TINY = Size("tiny", 2, 96, 64, 32, 64, 2, 96, 4, 8, 16, 4, 96, 2, 257)

SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        replace(_7B, name="7b-b1-l32768"),
        replace(_7B, name="7b-b8-l4096", batch=8, length=4096),
        replace(_7B, name="7b-b1-l4096", length=4096),
        replace(_7B, name="7b-b16-l4096", batch=16, length=4096),
        replace(_1B, name="1b-b1-l32768"),
        replace(_1B, name="1b-b8-l4096", batch=8, length=4096),
        _TINY,
    )
}
