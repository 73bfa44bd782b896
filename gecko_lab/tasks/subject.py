"""The model that a task examines: read in pieces, score answers, continue greedily, from states that can be forked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..artifacts import Artifact
from ..data.tokenizers import Tokenizer
from ..evaluation import prepared
from ..loss import token_losses
from ..model import LanguageModel, ModelState

PIECE = 16_384


class Scored(NamedTuple):
    """Answers under teacher forcing, one number a row: nats of the whole answer, its tokens, how many of them were the
    model's first choice, and whether all were, which is to say that greedy decoding writes the answer."""

    nats: np.ndarray
    tokens: np.ndarray
    right: np.ndarray
    exact: np.ndarray


@dataclass
class Subject:
    """A model in eval mode on its device with its tokenizer. ``artifact`` is None for a model made in Python."""

    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str = "32-true"
    artifact: Artifact | None = None

    @staticmethod
    def of(artifact: Artifact, device: str = "auto", precision: str | None = None) -> Subject:
        """From what ``open_artifact`` found; LabError for a device or tokenizer that is not there."""
        tokenizer = artifact.tokenizer()
        model, where, precision = prepared(artifact, device, precision)
        return Subject(model, tokenizer, where, precision, artifact)

    @property
    def window(self) -> int | None:
        """Tokens that the widest attention sees at most, the query's own included; None: everything."""
        widest = 0
        for block in self.model.blocks:
            attention: Any = block.attention
            if not attention.constant_state:
                return None
            positions = 2**40 + torch.arange(attention.chunk)  # one period of the grid, far from the start
            widest = max(widest, int((positions - attention.first_visible(positions) + 1).max()))
        return widest

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, the precision of the evaluation."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32-true"):
            yield

    def features(
        self, tokens: Tensor, state: ModelState | None = None, bos_id: int | None = -1
    ) -> tuple[Tensor, ModelState]:
        """(B, L, D) and the state after tokens (B, L). A BOS starts a document unless ``bos_id`` is None."""
        with self.inference():
            bos = self.tokenizer.bos_id if bos_id == -1 else bos_id
            return self.model.features(tokens.to(self.device), state, bos)

    def logits(self, features: Tensor) -> Tensor:
        """(B, L, V) float32 of the tokenizer's vocabulary."""
        with self.inference():
            return self.model.head(features).float()[..., : self.tokenizer.vocab_size]

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Nats (B, L) float32 of targets (B, L), the logits of a few thousand positions at a time."""
        with self.inference():
            return token_losses(features, self.model.head.weight, targets.to(self.device))

    def read(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        piece: int = PIECE,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[Tensor, ModelState]:
        """Read (B, L) of any length in pieces: logits (B, V) of the next token, and the state.

        A state is never changed by reading on from it, so several questions can be asked from one.
        """
        if tokens.shape[1] == 0:
            raise ValueError("nothing to read: give at least one token (a document starts with BOS)")
        for part in tokens.split(piece, dim=1):
            features, state = self.features(part, state)
            progress(part.numel())
        assert state is not None
        return self.logits(features[:, -1:])[:, 0], state

    def score(self, logits: Tensor, state: ModelState, answers: Sequence[np.ndarray]) -> Scored:
        """The answers (each (A,) tokens, of any lengths) after what gave ``logits`` (B, V) and ``state``."""
        lengths = np.asarray([len(a) for a in answers])
        if (lengths == 0).any():
            raise ValueError("an answer is empty: there is nothing to score")
        padded = np.zeros((len(answers), int(lengths.max())), dtype=np.int64)
        for row, answer in zip(padded, answers):
            row[: len(answer)] = answer
        targets = torch.from_numpy(padded).to(self.device)
        every = logits[:, None]
        if targets.shape[1] > 1:
            features, _ = self.features(targets[:, :-1], state, None)  # no token of an answer starts a document
            every = torch.cat([every, self.logits(features)], dim=1)
        nats = torch.nn.functional.cross_entropy(every.transpose(1, 2), targets, reduction="none")
        real = torch.arange(targets.shape[1], device=self.device) < torch.from_numpy(lengths).to(self.device)[:, None]
        right = ((every.argmax(-1) == targets) & real).sum(1).cpu().numpy()
        return Scored((nats.double() * real).sum(1).cpu().numpy(), lengths, right, right == lengths)

    def follow(self, logits: Tensor, state: ModelState, length: int) -> np.ndarray:
        """The greedy continuation (B, length)."""
        made = []
        for left in range(length, 0, -1):
            token = logits.argmax(-1)
            made.append(token)
            if left > 1:
                features, state = self.features(token[:, None], state, None)
                logits = self.logits(features)[:, 0]
        return torch.stack(made, 1).cpu().numpy() if made else np.zeros((len(logits), 0), dtype=np.int64)
