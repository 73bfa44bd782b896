"""The operations as explicit loops over time in float64 (from the specification, sections 1 to 5), slow and plain.

Scales are already 1 + weight; x (B, L, D); q, k, v (B, L, H, .). The moving average is without its skip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

F64 = torch.float64


@dataclass
class NormState:
    """count: (B,) int64; mean, var: (B, G).

    For TimestepNorm `mean`, `var` are the running population moments.
    For TimestepDecayNorm they are the *un-normalised* decayed sums M and V.
    """

    count: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor

    @staticmethod
    def zeros(batch: int, groups: int, dtype=F64) -> NormState:
        return NormState(
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, groups, dtype=dtype),
            torch.zeros(batch, groups, dtype=dtype),
        )


def _group_moments(row: torch.Tensor, groups: int):
    """row (D,) -> mean (G,), biased variance (G,) of this one time step."""
    cells = row.reshape(groups, -1)
    mu = cells.mean(dim=1)
    s2 = ((cells - mu[:, None]) ** 2).mean(dim=1)
    return mu, s2


def timestep_norm(x, scale, shift, groups, eps=1e-5, state=None, padding=None):
    """Megalodon's cumulative norm (spec 1.1). scale is already (1 + weight)."""
    B, L, D = x.shape
    state = state or NormState.zeros(B, groups, x.dtype)
    rows, counts, means, variances = [], [], [], []
    for b in range(B):
        n = int(state.count[b])
        m, v = state.mean[b], state.var[b]
        out = []
        for t in range(L):
            if padding is not None and bool(padding[b, t]):
                out.append(torch.zeros_like(x[b, t]))
                continue
            mu, s2 = _group_moments(x[b, t], groups)
            n += 1
            a = 1.0 / n
            d = mu - m  # uses the mean before the update
            v = (1 - a) * v + a * s2 + a * (1 - a) * d * d
            m = m + a * d
            r = (v + eps) ** -0.5
            z = (x[b, t].reshape(groups, -1) - m[:, None]) * r[:, None]
            out.append(z.reshape(D) * scale + shift)
        rows.append(torch.stack(out))
        counts.append(n)
        means.append(m)
        variances.append(v)
    return torch.stack(rows), NormState(torch.tensor(counts), torch.stack(means), torch.stack(variances))


def timestep_decay_norm(
    x, scale, shift, groups, beta1=0.999, beta2=0.9999, eps=1e-5, state=None, bos=None, padding=None
):
    """Gecko's decayed norm (spec 1.2). scale is already (1 + weight)."""
    B, L, D = x.shape
    state = state or NormState.zeros(B, groups, x.dtype)
    rows, counts, ms, vs = [], [], [], []
    for b in range(B):
        n = int(state.count[b])
        M, V = state.mean[b], state.var[b]
        out = []
        for t in range(L):
            if padding is not None and bool(padding[b, t]):
                out.append(torch.zeros_like(x[b, t]))
                continue
            if bos is not None and bool(bos[b, t]):
                n, M, V = 0, torch.zeros_like(M), torch.zeros_like(V)
            mu, s2 = _group_moments(x[b, t], groups)
            n += 1
            M = beta1 * M + (1 - beta1) * mu
            V = beta2 * V + (1 - beta2) * s2
            m_hat = M / (1 - beta1**n)
            v_hat = V / (1 - beta2**n)
            r = (v_hat + eps) ** -0.5
            z = (x[b, t].reshape(groups, -1) - m_hat[:, None]) * r[:, None]
            out.append(z.reshape(D) * scale + shift)
        rows.append(torch.stack(out))
        counts.append(n)
        ms.append(M)
        vs.append(V)
    return torch.stack(rows), NormState(torch.tensor(counts), torch.stack(ms), torch.stack(vs))


def rms_norm(x, groups=1, scale=None, eps=1e-5):
    """spec 2.1; scale is already (1 + weight) or None."""
    cells = x.reshape(*x.shape[:-1], groups, -1)
    y = (cells * ((cells**2).mean(-1, keepdim=True) + eps) ** -0.5).reshape(x.shape)
    return y if scale is None else y * scale


def layer_norm(x, groups=1, scale=None, shift=None, eps=1e-5):
    """spec 2.2."""
    cells = x.reshape(*x.shape[:-1], groups, -1)
    c = cells - cells.mean(-1, keepdim=True)
    y = (c * ((c**2).mean(-1, keepdim=True) + eps) ** -0.5).reshape(x.shape)
    return y if scale is None else y * scale + shift


def cema(x, p, q, g, h0=None, bos=None):
    """spec 3.2. x (B, L, D) -> y (B, L, D) without the skip term, final state (B, D, N)."""
    B, L, D = x.shape
    N = p.shape[1]
    outs, finals = [], []
    for b in range(B):
        h = h0[b] if h0 is not None else torch.zeros(D, N, dtype=q.dtype)
        out = []
        for t in range(L):
            keep = 0.0 if (bos is not None and bool(bos[b, t])) else 1.0
            h = keep * q * h + (p * x[b, t][:, None]).to(q.dtype)
            out.append((g * h).real.sum(dim=1))
        outs.append(torch.stack(out))
        finals.append(h)
    return torch.stack(outs), torch.stack(finals)


def rope_rotate(vec, position, base):
    """spec 4.1. vec (..., S): pairs (2j, 2j+1) turned by position * base^(-2j/S)."""
    S = vec.shape[-1]
    inv = torch.tensor([base ** (-2.0 * j / S) for j in range(S // 2)], dtype=vec.dtype)
    ang = position * inv
    c, s = torch.cos(ang), torch.sin(ang)
    even, odd = vec[..., 0::2], vec[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def visible_keys(t, chunk):
    """Absolute indices seen by the query at absolute position t (spec 4.2)."""
    first = max(t // chunk - 1, 0) * chunk
    return range(first, t + 1)


def sliding_chunk_attention(q, k, v, chunk, seg=None, rope_base=None, rope_heads=None, scale=1.0):
    """q, k (B, T, H, S), v (B, T, H, E), positions counted from 0 (spec 4.2).

    rope_base None leaves q and k as they are.
    """
    B, T, H, _ = q.shape
    rope_heads = H if rope_heads is None else rope_heads
    if rope_base is not None and rope_heads > 0:

        def turn(z):
            rows = [
                torch.cat([rope_rotate(z[:, t, :rope_heads], float(t), rope_base), z[:, t, rope_heads:]], 1)
                for t in range(T)
            ]
            return torch.stack(rows, 1)

        q, k = turn(q), turn(k)
    out = []
    for b in range(B):
        rows = []
        for t in range(T):
            keys = [j for j in visible_keys(t, chunk) if seg is None or int(seg[b, j]) == int(seg[b, t])]
            heads = []
            for h in range(H):
                score = torch.stack([scale * (q[b, t, h] @ k[b, j, h]) for j in keys])
                w = torch.softmax(score, 0)
                heads.append(sum(w[i] * v[b, j, h] for i, j in enumerate(keys)))
            rows.append(torch.stack(heads))
        out.append(torch.stack(rows))
    return torch.stack(out)


@dataclass
class WorkingMemory:
    """Per (batch row, head) state of spec 5.2.

    table (S, E), logz (S,), owner = segment id that the table belongs to (None when
    no chunk was ever written), older / newer = the two chunk buffers of (key, value, seg).
    """

    table: torch.Tensor
    logz: torch.Tensor
    owner: int | None = None
    older: list | None = None
    newer: list = field(default_factory=list)


def awm_read(mem: WorkingMemory, query, seg):
    if mem.owner is None or seg != mem.owner:
        return torch.zeros(mem.table.shape[1], dtype=mem.table.dtype)
    w = torch.softmax(query, 0)
    return sum(w[s] * mem.table[s] for s in range(w.shape[0]))


def awm_write(mem: WorkingMemory, block):
    """Fold one closed chunk into the table (spec 5.3)."""
    tail_seg = block[-1][2]
    S = mem.table.shape[0]
    table, logz = mem.table, mem.logz
    if mem.owner is not None and mem.owner != tail_seg:
        table = torch.zeros_like(table)
        logz = torch.full_like(logz, -math.inf)
    live = [(k, v) for k, v, g in block if g == tail_seg]
    # residual values: what the table, read with softmax(key over features), does not yet say
    resid = []
    for k, v in live:
        w = torch.softmax(k, 0)
        resid.append(v - sum(w[s] * table[s] for s in range(S)))
    keys = torch.stack([k for k, _ in live])  # (n, S)
    log_here = torch.logsumexp(keys, 0)  # (S,)
    log_all = torch.logaddexp(log_here, logz)
    rho = torch.exp(log_here - log_all)
    rows = []
    for s in range(S):
        w = torch.softmax(keys[:, s], 0)
        target = sum(w[i] * resid[i] for i in range(len(live)))
        rows.append(table[s] + rho[s] * (target - table[s]))
    mem.table, mem.logz, mem.owner = torch.stack(rows), log_all, tail_seg


def adaptive_working_memory(aq, ak, v, chunk, seg=None, memories=None):
    """aq, ak (B, T, H, S), v (B, T, H, E) -> (B, T, H, E) and the carried state (spec 5)."""
    B, T, H, S = aq.shape
    E = v.shape[-1]
    if memories is None:
        memories = [
            [
                WorkingMemory(torch.zeros(S, E, dtype=v.dtype), torch.full((S,), -math.inf, dtype=v.dtype))
                for _ in range(H)
            ]
            for _ in range(B)
        ]
    out = []
    for b in range(B):
        rows = []
        for t in range(T):
            g = 0 if seg is None else int(seg[b, t])
            heads = []
            for h in range(H):
                mem = memories[b][h]
                heads.append(awm_read(mem, aq[b, t, h], g))
                mem.newer.append((ak[b, t, h], v[b, t, h], g))
                if len(mem.newer) == chunk:
                    if mem.older is not None:
                        awm_write(mem, mem.older)
                    mem.older, mem.newer = mem.newer, []
            rows.append(torch.stack(heads))
        out.append(torch.stack(rows))
    return torch.stack(out), memories
