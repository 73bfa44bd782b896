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
from . import chain, rows

_library = torch.library.Library("gecko_lab", "FRAGMENT")
_library.define("memory_sums(Tensor ak, Tensor v, Tensor? first, int chunks) -> (Tensor, Tensor, Tensor)")
_library.define(
    "memory_sums_backward(Tensor dlam, Tensor dmix, Tensor dtarget, Tensor ak, Tensor v, Tensor mix, Tensor target, "
    "Tensor? first) -> (Tensor, Tensor)"
)
_library.define(
    "memory_table(Tensor aq, Tensor lam, Tensor mix, Tensor target, Tensor keep, Tensor? table, Tensor? logz, "
    "Tensor? live, int chunk, int offset, int skip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "memory_table_backward(Tensor dy, Tensor? dlast, Tensor? dlogz, Tensor aq, Tensor mix, Tensor target, Tensor keep, "
    "Tensor rho, Tensor tables, Tensor? live, int chunk, int offset, int skip) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _wide(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _sums(ak: Tensor, v: Tensor, first: Tensor | None, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, features = ak.shape
    chunk = length // chunks
    weights, lam = rows.softmax_time(ak, chunks, first)
    answers = rows.softmax_features(ak, None)
    mix = _wide((batch, heads, chunks, features, features), ak)
    target = _wide((batch, heads, chunks, features, v.shape[3]), ak)
    by_key = window(weights, 0, chunk, chunks, chunk).transpose(-1, -2)
    product(mix, by_key, window(answers, 0, chunk, chunks, chunk))
    product(target, by_key, window(v, 0, chunk, chunks, chunk))
    return lam, mix, target


def _sums_backward(
    dlam: Tensor,
    dmix: Tensor,
    dtarget: Tensor,
    ak: Tensor,
    v: Tensor,
    mix: Tensor,
    target: Tensor,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chunks = mix.shape[2]
    chunk = ak.shape[1] // chunks
    weights, lam = rows.softmax_time(ak, chunks, first)
    answers = rows.softmax_features(ak, None)
    dmix, dtarget = dmix.contiguous(), dtarget.contiguous()
    column = dlam - rows.row_dot(dtarget, target) - rows.row_dot(dmix, mix)
    dmix, dtarget = dmix.to(ak.dtype), dtarget.to(ak.dtype)

    def cells(x: Tensor) -> Tensor:
        return window(x, 0, chunk, chunks, chunk)

    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    product(cells(dv), cells(weights), dtarget)
    over_features, from_keys, from_values = (_wide(ak.shape, ak) for _ in range(3))
    product(cells(over_features), cells(weights), dmix)
    product(cells(from_keys), cells(answers), dmix.transpose(-1, -2))
    product(cells(from_values), cells(v), dtarget.transpose(-1, -2))
    dak = rows.softmax_both_backward(ak, over_features, (from_keys, from_values), lam, column.contiguous(), first)
    return dak, dv


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
    chain.forward(tables, mix, target, rho, keep, aq.dtype)
    y = torch.empty((batch, length, heads, width), dtype=aq.dtype, device=aq.device)
    y[:, : skip * chunk] = 0.0
    queries = rows.softmax_features(aq, live)
    stored = tables.to(aq.dtype)
    for row, count, chunks, index in _reads(length, chunk, offset, skip):
        product(
            window(y, row, count, chunks, chunk),
            window(queries, row, count, chunks, chunk),
            stored[:, :, index : index + chunks],
        )
    return y, tables[:, :, -1].clone(), last, rho, tables


def _table_backward(
    dy: Tensor,
    dlast: Tensor | None,
    dlogz: Tensor | None,
    aq: Tensor,
    mix: Tensor,
    target: Tensor,
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
    dlam, dmix, dtarget = _wide(mix.shape[:4], mix), torch.empty_like(mix), torch.empty_like(target)
    for x in (dlam, dmix, dtarget):
        x[:, :, folds:] = 0.0
    mix, target = mix[:, :, :folds], target[:, :, :folds]
    queries = rows.softmax_features(aq, live)
    # the softmax's derivative subtracts means, which would enlarge the rounding of the tables to bfloat16
    stored = rows.split(tables) if aq.dtype == torch.bfloat16 else tables
    dqueries, grad = _wide((*aq.shape[:3], stored.shape[3]), aq), _wide(tables.shape, aq)
    dqueries[:, : skip * chunk] = 0.0
    read = 0 if skip == 0 else 1
    grad[:, :, :read] = 0.0
    for row, count, chunks, index in _reads(length, chunk, offset, skip):
        out = window(dy, row, count, chunks, chunk)
        at = slice(index, index + chunks)
        product(window(dqueries, row, count, chunks, chunk), out, stored[:, :, at].transpose(-1, -2))
        product(grad[:, :, at], window(queries, row, count, chunks, chunk).transpose(-1, -2), out)
        read = index + chunks
    grad[:, :, read:] = 0.0
    if dlast is not None:
        grad[:, :, -1] += dlast
    daq = rows.softmax_features_backward(aq, dqueries, live)
    chain.backward(grad, mix, rho, keep, aq.dtype)
    after = grad[:, :, 1:]
    outer = _outer(grad, tables, stored) * keep[:, None, :, None, None]
    drho = rows.row_dot(after, target) - outer.diagonal(dim1=-2, dim2=-1) - rows.row_dot(outer, mix)
    dlam[:, :, :folds], dlogz0 = rows.shares_backward(drho, None if dlogz is None else dlogz.contiguous(), rho, keep)
    torch.mul(outer, -rho[..., None], out=dmix[:, :, :folds])
    torch.mul(after, rho[..., None], out=dtarget[:, :, :folds])
    return daq, dlam, dmix, dtarget, grad[:, :, 0].clone(), dlogz0


def _outer(grad: Tensor, tables: Tensor, stored: Tensor) -> Tensor:
    """grad[f + 1] tables[f]^T for each fold f, (B, H, F, S, S), in two bfloat16 a number where `stored` is."""
    batch, heads, folds, features, _ = tables.shape
    right = stored[:, :, :-1].transpose(-1, -2)
    if stored is tables:
        outer = _wide((batch, heads, folds - 1, features, features), tables)
        product(outer, grad[:, :, 1:], right)
        return outer
    parts = _wide((batch, heads, folds - 1, 2 * features, 2 * features), tables)
    product(parts, rows.split(grad)[:, :, 1:], right)
    high, low = parts.unflatten(-1, (2, -1)).split(features, 3)
    return high[..., 0, :] + high[..., 1, :] + low[..., 0, :]


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
    target: Tensor,
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
    return aq.new_empty(aq.shape), new(mix.shape[:4]), new(mix.shape), new(target.shape), table, logz


for _name, _run, _fake in (
    ("memory_sums", _sums, _fake_sums),
    ("memory_sums_backward", _sums_backward, _fake_sums_backward),
    ("memory_table", _table, _fake_table),
    ("memory_table_backward", _table_backward, _fake_table_backward),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"gecko_lab::{_name}", _fake, lib=_library)
