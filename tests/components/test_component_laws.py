"""The laws of gecko_lab/laws.py for everything in the registry: a new component is here as soon as it is registered."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gecko_lab import laws
from gecko_lab.components import KINDS
from gecko_lab.components.norm import RMSNorm

OPTIONS = [
    ("ema", "complex", {"omega_skip": True, "scale": True}),
    ("ema", "real", {"mega": True}),
    ("attention", "sliding_window", {"window": 1}),
    ("attention", "sliding_window", {"window": 5}),
    ("memory", "adaptive_working", {"lag": 1}),
    ("memory", "adaptive_working", {"lag": 3}),
    ("feedforward", "mlp", {"bias": True, "rescale": True, "norm": "rms"}),
    ("block", "gecko", {"two_hop_residual": True}),
]


def subjects() -> list:
    found = [laws.Subject(kind, name) for kind, registry in KINDS.items() for name in registry]
    found += [laws.Subject(kind, name, options=options) for kind, name, options in OPTIONS]
    for kind in ("ema", "norm", "attention", "memory", "feedforward"):
        for name in KINDS[kind]:
            if name != laws.PARTS[kind]:
                found.append(laws.Subject("block", "gecko", parts={kind: name}))
    partial = dataclasses.replace(laws.TINY, num_rope_heads=1)
    found.append(laws.Subject("attention", "chunk", partial))
    found.append(laws.Subject("block", "llama", partial, parts={"attention": "full", "norm": "rms"}))
    return found


def label(s: laws.Subject) -> str:
    extra = [*s.parts.values(), *(f"{k}={v}" for k, v in s.options.items())]
    extra += ["rope1"] if s.shape.num_rope_heads else []
    return "-".join([s.kind, s.name, *extra])


SUBJECTS = subjects()


@pytest.mark.parametrize("law", laws.LAWS.values(), ids=laws.LAWS.keys())
@pytest.mark.parametrize("subject", SUBJECTS, ids=map(label, SUBJECTS))
def test_law(subject, law):
    law(subject)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in KINDS[k]])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_cuts(kind, name, data):
    length = data.draw(st.integers(1, 30), "length")
    cuts = data.draw(st.lists(st.integers(1, length - 1), max_size=6) if length > 1 else st.just([]), "cuts")
    inputs = (subject := laws.Subject(kind, name)).inputs(1, length)
    documents = data.draw(st.sampled_from([None, laws.random_documents(1, length, length)]), "documents")
    subject.same("random cuts", subject.run_pieces(inputs, documents, cuts)[0], subject.run(inputs, documents)[0])


@pytest.mark.parametrize("shape", [(1, 1), (2, 37), (3, 64)], ids=lambda s: f"gecko-B{s[0]}-L{s[1]}")
def test_gecko_block_lengths(shape):
    batch, length = shape
    subject = laws.Subject("block", "gecko")
    laws.pieces(subject, batch, length, [c for c in (1, 9, 33) if c < length])


class Acausal(nn.Module):
    """Breaks causality and nothing that needs a state."""

    def forward(self, x, documents=None, state=None):
        return x + x.mean(1, keepdim=True), None


class Forgetful(nn.Module):
    """Right in one call, wrong in pieces: it drops its state."""

    def forward(self, x, documents=None, state=None):
        return x.cumsum(1), None


class Leaky(nn.Module):
    """A running sum that ignores where documents begin."""

    def forward(self, x, documents=None, state=None):
        y = x.cumsum(1) + (0 if state is None else state[:, None])
        return y, y[:, -1]


class Cut(nn.Module):
    """Carries the value of its state but not the gradient."""

    def forward(self, x, documents=None, state=None):
        y = x.cumsum(1) + (0 if state is None else state[:, None].detach())
        return y, y[:, -1]


class Growing(RMSNorm):
    """Keeps everything that it read."""

    def forward(self, x, documents=None, state=None):
        return self.normalize(x), x if state is None else torch.cat((state, x), 1)


class Coarse(nn.Module):
    """A state in the dtype of the activations."""

    def forward(self, x, documents=None, state=None):
        return x, x[:, -1]


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad


class WrongGradient(nn.Module):
    def forward(self, x, documents=None, state=None):
        return Wrong.apply(x), None


class RowMixer(nn.Module):
    """Rows of the batch see each other."""

    def forward(self, x, documents=None, state=None):
        return x - x[:1], None


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (Acausal, laws.causality),
        (Forgetful, laws.pieces),
        (Leaky, laws.documents_alone),
        (Cut, laws.state_gradients),
        (Coarse, laws.bfloat16),
        (WrongGradient, laws.gradients),
        (RowMixer, laws.state_handling),
    ],
)
def test_laws_catch(broken, law):
    subject = laws.Subject("norm", "rms")
    subject.module = broken()
    with pytest.raises(laws.LawBroken):
        law(subject)


def test_law_catches_growing_state():
    subject = laws.Subject("norm", "rms")
    subject.module = Growing(RMSNorm.Config(), subject.shape).double()
    with pytest.raises(laws.LawBroken, match="constant state"):
        laws.constant_state(subject)


def test_check_names_the_laws():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert laws.check("ema", "none") == list(laws.LAWS)
