"""The laws that every component obeys, as functions: the tests run them over the registry, you over your component.

    from gecko_lab import laws
    laws.check("attention", "mine")                      # every law at a tiny size; raises LawBroken
    laws.check("block", "gecko", parts={"ema": "mine"})  # inside a block

A component is a causal function of a sequence and a state, its documents are independent of each other, and any cut
of a sequence into pieces gives what the whole gives (docs/architecture.md).
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .components import KINDS, Documents, Shape
from .components import state as states
from .components.registry import Parts

TINY = Shape(dim=8, z_dim=8, value_dim=12, num_heads=2, ffn_dim=6, chunk_size=4, ema_modes=3, norm_groups=2)
PARTS = {
    "ema": "complex",
    "norm": "timestep_decay",
    "attention": "sliding_chunk",
    "memory": "adaptive_working",
    "feedforward": "swiglu",
    "block": "gecko",
}
WITHOUT: tuple[dict[str, str], ...] = ({}, {"memory": "none"}, {"memory": "none", "ema": "none"})


class LawBroken(AssertionError):
    """A component breaks a law; the message names both and the size of the difference."""


@dataclass
class Subject:
    """A component under test. The module has random parameters (nothing rests at its zero start) and is float64."""

    kind: str
    name: str
    shape: Shape = TINY
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.module = self._build().double()
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def _build(self) -> nn.Module:
        cls = KINDS[self.kind][self.name]
        if self.kind != "block":
            module: nn.Module = cls(cls.Config(**self.options), self.shape)
            return module
        refusal: ValueError | None = None
        for without in WITHOUT:  # a block may have no place for a memory or an average: it says so
            chosen = {**PARTS, **without, **self.parts, "block": self.name}
            configs = {kind: KINDS[kind][name].Config() for kind, name in chosen.items()}
            configs["block"] = cls.Config(**self.options)
            try:
                module = cls(configs["block"], self.shape, Parts(configs, self.shape))
            except ValueError as error:
                refusal = refusal or error
            else:
                return module
        assert refusal is not None
        raise refusal

    def inputs(self, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random sequences (B, L, ...) float64 for one call: x, or q, k, v of an attention or a memory."""
        s = self.shape
        query, value = (s.num_heads, s.head_dim), (s.num_heads, s.value_head_dim)
        sizes = [query, query, value] if self.kind in ("attention", "memory") else [(s.dim,)]
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, length, *size, dtype=torch.float64, generator=generator) for size in sizes)

    def run(self, inputs: Sequence[Tensor], documents: Documents | None = None, state: Any = None,
            module: nn.Module | None = None) -> tuple[Tensor, Any]:
        """One call. A memory that returns None adds nothing, so it counts as zero."""
        y, state = (module or self.module)(*inputs, documents=documents, state=state)
        return inputs[-1] * 0 if y is None else y, state

    def run_pieces(self, inputs: Sequence[Tensor], documents: Documents | None, cuts: Sequence[int],
                   ) -> tuple[Tensor, Any]:
        """The same sequence cut before each index of ``cuts``, the state carried over."""
        edges = [0, *sorted(set(cuts)), inputs[0].shape[1]]
        outputs, state = [], None
        for start, stop in itertools.pairwise(edges):
            y, state = self.run([x[:, start:stop] for x in inputs], piece(documents, start, stop), state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def same(self, law: str, got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
        """Raise LawBroken unless the difference is at most ``tolerance`` times the largest expected number (or 1)."""
        if got.shape != expected.shape:
            raise LawBroken(f"{self.kind} {self.name!r}, {law}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
        if not got.numel():
            return
        difference = float((got.detach().double() - expected.detach().double()).abs().max())
        if not difference <= tolerance * max(1.0, float(expected.detach().abs().max())):  # "not <=" also catches NaN
            raise LawBroken(f"{self.kind} {self.name!r}, {law}: differs by {difference:.1e}, allowed {tolerance:.0e}")


def piece(documents: Documents | None, start: int, stop: int) -> Documents | None:
    return None if documents is None else Documents(*(leaf[:, start:stop] for leaf in documents))


def random_documents(batch: int, length: int, seed: int = 0) -> Documents:
    """About one document in six tokens; the first row's stream opens with a BOS, the others may not."""
    bos = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 1 / 6
    bos[0, 0] = True
    return Documents.from_bos(bos)


def _both(batch: int, length: int) -> tuple[Documents | None, ...]:
    return None, random_documents(batch, length)


def causality(s: Subject, batch: int = 2, length: int = 19) -> None:
    """An output does not depend on later inputs."""
    inputs, other = s.inputs(batch, length, 1), s.inputs(batch, length, 2)
    for documents in _both(batch, length):
        y = s.run(inputs, documents)[0]
        for t in (1, s.shape.chunk_size, length // 2, length - 1):
            changed = [torch.cat((x[:, :t], o[:, t:]), 1) for x, o in zip(inputs, other)]
            s.same(f"causality at {t}", s.run(changed, documents)[0][:, :t], y[:, :t])


def pieces(s: Subject, batch: int = 2, length: int = 23, cuts: Sequence[int] = (1, 2, 7, 8, 13, 20, 21)) -> None:
    """Any cut into pieces, the state carried, gives the outputs and the final state of the whole."""
    inputs = s.inputs(batch, length)
    for documents in _both(batch, length):
        whole, end = s.run(inputs, documents)
        for cut in (cuts, range(1, length)):
            y, state = s.run_pieces(inputs, documents, cut)
            s.same(f"pieces cut at {list(cut)}", y, whole)
            for got, expected in zip(states.tensors(state), states.tensors(end), strict=True):
                s.same(f"state after pieces cut at {list(cut)}", torch.view_as_real(got) if got.is_complex() else got,
                       torch.view_as_real(expected) if expected.is_complex() else expected)


def documents_alone(s: Subject, batch: int = 2) -> None:
    """Packed documents give what each gives alone (those that begin on the chunk grid: it is absolute), and whatever
    stands in another document changes nothing."""
    chunk = s.shape.chunk_size
    starts = [0, 2 * chunk, 3 * chunk, 7 * chunk]
    length = starts[-1] + chunk + 1
    bos = torch.zeros(batch, length, dtype=torch.bool)
    bos[:, starts] = True
    packed, inputs = Documents.from_bos(bos), s.inputs(batch, length)
    y = s.run(inputs, packed)[0]
    for start, stop in zip(starts, [*starts[1:], length]):
        alone, _ = s.run([x[:, start:stop] for x in inputs], Documents.from_bos(bos[:, start:stop]))
        s.same("packed documents = documents alone", y[:, start:stop], alone, 1e-5)  # float32 tables of positions

    documents, other = random_documents(batch, length), s.inputs(batch, length, 3)
    y = s.run(inputs, documents)[0]
    for segment in documents.segments.unique().tolist():
        own = documents.segments == segment
        mixed = [torch.where(own.view(batch, length, *[1] * (x.dim() - 2)), x, o) for x, o in zip(inputs, other)]
        s.same("documents are independent", s.run(mixed, documents)[0][own], y[own])


def gradients(s: Subject, batch: int = 1, length: int = 14) -> None:
    """The backward pass agrees with finite differences in float64, for inputs and parameters."""
    names = [name for name, _ in s.module.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in s.module.parameters()]
    inputs = [x.requires_grad_() for x in s.inputs(batch, length)]
    for documents in _both(batch, length):

        def call(*tensors: Tensor, documents: Documents | None = documents) -> Tensor:
            xs, values = tensors[: len(inputs)], tensors[len(inputs) :]
            arguments = {"documents": documents, "state": None}
            y, _ = functional_call(s.module, dict(zip(names, values)), tuple(xs), arguments)
            return xs[-1] * 0 if y is None else y

        # fast mode: one random projection a tensor instead of every entry
        try:
            torch.autograd.gradcheck(call, (*inputs, *parameters), atol=1e-5, rtol=1e-4, fast_mode=True)
        except RuntimeError as error:
            raise LawBroken(f"{s.kind} {s.name!r}, gradients: {error}") from error


def state_gradients(s: Subject, batch: int = 2, length: int = 18, cuts: Sequence[int] = (3, 4, 9, 10)) -> None:
    """The gradient through a carried state is the gradient of the uncut sequence."""
    inputs = [x.requires_grad_() for x in s.inputs(batch, length)]
    wanted = [*inputs, *s.module.parameters()]
    for documents in _both(batch, length):
        whole = s.run(inputs, documents)[0]
        weight = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        cut = s.run_pieces(inputs, documents, cuts)[0]
        expected, got = (torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True) for y in (whole, cut))
        for g, e in zip(got, expected):
            if g is not None and e is not None:
                s.same("gradient through the state", g, e, 1e-8)
            elif g is not e:
                raise LawBroken(f"{s.kind} {s.name!r}, gradient through the state: missing on one side")


def bfloat16(s: Subject, batch: int = 2, length: int = 37) -> None:
    """bfloat16 is finite, close to float32, and keeps statistics in float32 (buffered keys and values excepted)."""
    low = copy.deepcopy(s.module).bfloat16()
    high = copy.deepcopy(low).float()  # the same rounded weights: what differs is the arithmetic
    inputs = [x.bfloat16() for x in s.inputs(batch, length)]
    for documents in _both(batch, length):
        y, state = s.run(inputs, documents, module=low)
        expected, _ = s.run([x.float() for x in inputs], documents, module=high)
        if y.dtype != torch.bfloat16:
            raise LawBroken(f"{s.kind} {s.name!r}, bfloat16: the output is {y.dtype}")
        s.same("bfloat16 close to float32", y.float(), expected, 0.06)
        floats = [t for t in states.tensors(state) if t.is_floating_point()]
        if s.kind in ("ema", "norm", "memory") and any(t.dtype == torch.bfloat16 for t in floats):
            raise LawBroken(f"{s.kind} {s.name!r}, bfloat16: the state must be float32 or wider")


def state_handling(s: Subject, batch: int = 3, length: int = 21, at: int = 10) -> None:
    """A state can be detached, saved, restored, moved and sliced by row, and the stream goes on."""
    inputs, documents = s.inputs(batch, length), random_documents(batch, length)
    head, tail = ([x[:, a:b] for x in inputs] for a, b in ((0, at), (at, length)))
    for docs in (None, documents):
        state = s.run(head, piece(docs, 0, at))[1]
        rest = piece(docs, at, length)
        y = s.run(tail, rest, state)[0]
        file = io.BytesIO()
        torch.save(states.flatten(states.detach(state))[0], file)
        file.seek(0)
        restored = states.unflatten(torch.load(file, weights_only=True), state)
        s.same("restored state", s.run(tail, rest, restored)[0], y, 0.0)
        moved = states.to(states.clone(state), tail[0].device)
        s.same("moved state", s.run(tail, rest, moved)[0], y, 0.0)
        some = [2, 0]
        some_rest = None if rest is None else Documents(*(leaf[some] for leaf in rest))
        s.same("rows of a state", s.run([x[some] for x in tail], some_rest, states.rows(state, some))[0], y[some])


def constant_state(s: Subject, batch: int = 2) -> None:
    """A state's size depends on where in a chunk the stream stands, not on how much of it was read."""
    if not all(getattr(module, "constant_state", True) for module in s.module.modules()):
        return
    chunk = s.shape.chunk_size
    for rest in (0, 1, chunk - 1):
        sizes = {n: states.nbytes(s.run(s.inputs(batch, n * chunk + rest))[1]) for n in (4, 5, 9)}
        if len(set(sizes.values())) > 1:
            raise LawBroken(f"{s.kind} {s.name!r}, constant state: bytes after chunks of tokens: {sizes}")


LAWS: dict[str, Callable[[Subject], None]] = {
    law.__name__: law
    for law in (
        causality, pieces, documents_alone, gradients, state_gradients, bfloat16, state_handling, constant_state,
    )
}


def check(kind: str, name: str, *, parts: dict[str, str] | None = None, shape: Shape | None = None,
          **options: Any) -> list[str]:
    """Hold a component to every law; ``options`` are fields of its Config, ``parts`` a block's other choices.

    Returns the names of the laws. Raises LawBroken at the first that does not hold, UnknownComponent for a wrong name.
    """
    subject = Subject(kind, name, shape or dataclasses.replace(TINY), options, parts or {})
    for law in LAWS.values():
        law(subject)
    return list(LAWS)
