"""The adaptive working memory as four opaque operators (spec 5 in the form of design note 6e).

`memory_sums`: a chunk acts on the table only through lam (its logsumexp over time), mix = W Q and target = W v.
`memory_table`: M' = A M + rho target with A = keep (diag(1 - rho) - rho mix), one chunk after another, and the reads
softmax(aq) M. Sums and tables are float32, batched (B, H, chunks, ...); products take the dtype of the inputs and sum
in float32. Everything but the chain is parallel over chunks; the chain is one product a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..products import product
from ..sliding_chunk_attention.plan import window
from . import chain, rows, tiles

_library = torch.library.Library("gecko_lab", "FRAGMENT")
_library.define("memory_sums(Tensor ak, Tensor v, Tensor? first, int chunks) -> (Tensor, Tensor, Tensor)")
_library.define(
    "memory_sums_backward(Tensor dlam, Tensor dmix, Tensor dtarget, Tensor ak, Tensor v, Tensor lam, Tensor mix, "
    "Tensor target, Tensor? first) -> (Tensor, Tensor)"
)
_library.define(
    "memory_table(Tensor aq, Tensor lam, Tensor mix, Tensor target, Tensor keep, Tensor? table, Tensor? logz, "
    "Tensor? live, int chunk, int offset, int skip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "memory_table_backward(Tensor dy, Tensor? dlast, Tensor? dlogz, Tensor aq, Tensor mix, Tensor keep, Tensor rho, "
    "Tensor tables, Tensor? live, int chunk, int offset, int skip) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _wide(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _cells(x: Tensor, chunks: int) -> Tensor:
    """x (B, L, H, S) by chunks, (B, H, N, L / N, S)."""
    chunk = x.shape[1] // chunks
    return window(x, 0, chunk, chunks, chunk)


def _sums(ak: Tensor, v: Tensor, first: Tensor | None, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, answers, lam = rows.softmax_keys(ak, chunks, first)
    mix, target = (_wide((*lam.shape, x.shape[3]), ak) for x in (answers, v))
    for out, x in ((mix, answers), (target, v)):
        product(out, _cells(weights, chunks).transpose(-1, -2), _cells(x, chunks))
    return lam, mix, target


def _sums_backward(
    dlam: Tensor,
    dmix: Tensor,
    dtarget: Tensor,
    ak: Tensor,
    v: Tensor,
    lam: Tensor,
    mix: Tensor,
    target: Tensor,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chunks = lam.shape[2]
    weights, answers, _ = rows.softmax_keys(ak, chunks, first, lam)
    column = dlam.contiguous()
    dots, dtarget = rows.row_dot(dtarget, target, ak.dtype)
    column = column - dots
    dots, dmix = rows.row_dot(dmix, mix, ak.dtype)
    column -= dots

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    product(_cells(dv, chunks), _cells(weights, chunks), dtarget)
    if tiles.serves(ak, v, ak.shape[1] // chunks):
        return tiles.key_gradient(ak, v, (weights, answers, lam), dmix, dtarget, column, first), dv
    over_features, from_keys, from_values = (_wide(ak.shape, ak) for _ in range(3))
    for out, left, right in (
        (over_features, weights, dmix),
        (from_keys, answers, dmix.transpose(-1, -2)),
        (from_values, v, dtarget.transpose(-1, -2)),
    ):
        product(_cells(out, chunks), _cells(left, chunks), right)
    return rows.softmax_both_backward(ak, over_features, (from_keys, from_values), lam, column, first), dv


def _reads(length: int, chunk: int, offset: int, skip: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, chunks, index of the first's table) of the rows that read a table that can hold anything.

    The first row is the `offset`-th of its chunk. With skip > 0 the first `skip` chunks read nothing and the chunk
    after them reads table 1; with skip = 0 the first chunk reads table 0.
    """
    row, index = (skip * chunk, 1) if skip else (0, 0)
    if offset and row < length:
        head = min(chunk - offset, length)
        yield row, head, 1, index
        row, index = row + head, index + 1
    if count := max(length - row, 0) // chunk:
        yield row, chunk, count, index
        row, index = row + count * chunk, index + count
    if row < length:
        yield row, length - row, 1, index


def _table(
    aq: Tensor,
    lam: Tensor,
    mix: Tensor,
    target: Tensor,
    keep: Tensor,
    table: Tensor | None,
    logz: Tensor | None,
    live: Tensor | None,
    chunk: int,
    offset: int,
    skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last table and normaliser, and rho and tables (B, H, F + 1, S, E) for the backward pass.

    The first F chunks of lam, mix and target (B, H, N, ...) are folded, F the length of keep (B, F).
    """
    batch, length, heads, features = aq.shape
    folds, width = keep.shape[1], target.shape[4]
    lam, mix, target = (x[:, :, :folds] for x in (lam, mix, target))
    if logz is None:
        logz = torch.full((batch, heads, features), rows.NOTHING, dtype=torch.float32, device=aq.device)
    rho, last = rows.shares(lam.contiguous(), keep, logz.contiguous())
    tables = _wide((batch, heads, folds + 1, features, width), aq)
    tables[:, :, 0] = 0.0 if table is None else table
    narrow = chain.forward(tables, mix, target, rho, keep, aq.dtype)
    y = torch.empty((batch, length, heads, width), dtype=aq.dtype, device=aq.device)
    y[:, : skip * chunk] = 0.0
    queries = rows.softmax_features(aq, live)
    for row, count, chunks, index in _reads(length, chunk, offset, skip):
        out, by = (window(x, row, count, chunks, chunk) for x in (y, queries))
        product(out, by, narrow[:, :, index : index + chunks])
    return y, tables[:, :, -1].clone(), last, rho, tables


def _table_backward(
    dy: Tensor,
    dlast: Tensor | None,
    dlogz: Tensor | None,
    aq: Tensor,
    mix: Tensor,
    keep: Tensor,
    rho: Tensor,
    tables: Tensor,
    live: Tensor | None,
    chunk: int,
    offset: int,
    skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """daq, dlam, dmix, dtarget, dtable, dlogz."""
    length, folds = aq.shape[1], keep.shape[1]
    dlam, dmix = _wide(mix.shape[:4], mix), torch.empty_like(mix)
    grad = _wide((*mix.shape[:2], mix.shape[2] + 1, *tables.shape[3:]), aq)  # of the tables, then of the targets
    for x in (dlam, dmix, grad[:, :, 1:]):
        x[:, :, folds:] = 0.0
    queries = rows.softmax_features(aq, live)
    # The softmax's derivative does not see what a column of the table has in common, but would see its rounding.
    narrow, centred = rows.narrow_tables(tables) if aq.dtype == torch.bfloat16 else (tables, tables)
    by_tiles = tiles.serves(aq, dy, chunk, offset)
    if by_tiles:
        daq = tiles.query_gradient(aq, dy, centred, live, chunk, offset, skip)
    else:
        dqueries = _wide(aq.shape, aq)
        dqueries[:, : skip * chunk] = 0.0
    read = 0 if skip == 0 else 1
    grad[:, :, :read] = 0.0
    for row, count, chunks, index in _reads(length, chunk, offset, skip):
        at = slice(index, index + chunks)
        by, of = (window(x, row, count, chunks, chunk) for x in (dy, queries))
        product(grad[:, :, at], of.transpose(-1, -2), by)
        if not by_tiles:
            product(window(dqueries, row, count, chunks, chunk), by, centred[:, :, at].transpose(-1, -2))
        read = index + chunks
    grad[:, :, read : folds + 1] = 0.0
    if dlast is not None:
        grad[:, :, folds] += dlast
    if not by_tiles:
        daq = rows.softmax_features_backward(aq, dqueries, live)
    after, turn = chain.backward(grad[:, :, : folds + 1], tables, mix[:, :, :folds], rho, keep, aq.dtype)
    product(dmix[:, :, :folds], after, narrow[:, :, :-1].transpose(-1, -2))
    dmix[:, :, :folds] *= -keep[:, None, :, None, None]
    dlam[:, :, :folds], dlogz0 = rows.shares_backward(turn, None if dlogz is None else dlogz.contiguous(), rho, keep)
    return daq, dlam, dmix, grad[:, :, 1:], grad[:, :, 0].clone(), dlogz0


def _fake_sums(ak: Tensor, v: Tensor, first: Tensor | None, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, features = ak.shape
    shape = (batch, heads, chunks, features)
    new = lambda *size: ak.new_empty(size, dtype=torch.float32)
    return new(*shape), new(*shape, features), new(*shape, v.shape[3])


def _fake_sums_backward(
    dlam: Tensor,
    dmix: Tensor,
    dtarget: Tensor,
    ak: Tensor,
    v: Tensor,
    lam: Tensor,
    mix: Tensor,
    target: Tensor,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return ak.new_empty(ak.shape), v.new_empty(v.shape)


def _fake_table(
    aq: Tensor,
    lam: Tensor,
    mix: Tensor,
    target: Tensor,
    keep: Tensor,
    table: Tensor | None,
    logz: Tensor | None,
    live: Tensor | None,
    chunk: int,
    offset: int,
    skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, features = aq.shape
    folds, width = keep.shape[1], target.shape[4]
    new = lambda *size: aq.new_empty(size, dtype=torch.float32)
    y = aq.new_empty((batch, length, heads, width))
    table, logz = new(batch, heads, features, width), new(batch, heads, features)
    return y, table, logz, new(batch, heads, folds, features), new(batch, heads, folds + 1, features, width)


def _fake_table_backward(
    dy: Tensor,
    dlast: Tensor | None,
    dlogz: Tensor | None,
    aq: Tensor,
    mix: Tensor,
    keep: Tensor,
    rho: Tensor,
    tables: Tensor,
    live: Tensor | None,
    chunk: int,
    offset: int,
    skip: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, _, features, width = tables.shape
    new = lambda size: tables.new_empty(size)
    table, logz = new((batch, heads, features, width)), new((batch, heads, features))
    targets = new((batch, heads, mix.shape[2] + 1, features, width))[:, :, 1:]
    return aq.new_empty(aq.shape), new(mix.shape[:4]), new(mix.shape), targets, table, logz


for _name, _run, _fake in (
    ("memory_sums", _sums, _fake_sums),
    ("memory_sums_backward", _sums_backward, _fake_sums_backward),
    ("memory_table", _table, _fake_table),
    ("memory_table_backward", _table_backward, _fake_table_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_library)
