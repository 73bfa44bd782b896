"""A model that knows one thing: what followed the last time that the text ended like this. Only the last ``sight``
tokens are seen."""

from typing import Any

import torch
from torch import Tensor

from gecko_lab.build import build_model
from gecko_lab.data.tokenizers import ByteTokenizer
from gecko_lab.tasks import Subject


class Copier(Subject):
    def __init__(self, sight: int = 10**9) -> None:
        with torch.device("meta"):
            model = build_model("model.num_layers=1")  # for its name only
        super().__init__(model, ByteTokenizer(), torch.device("cpu"))
        self.sight = sight

    window = None  # type: ignore[assignment]

    def features(self, tokens: Tensor, state: Any = None, bos_id: int | None = -1) -> tuple[Tensor, Any]:
        whole = tokens if state is None else torch.cat([state.expand(len(tokens), -1), tokens], 1)
        rows = []
        for row in whole.tolist():
            text = [chr(t) for t in row]
            ends = range(len(row) - tokens.shape[1] + 1, len(row) + 1)
            rows.append([self._next("".join(text[:end])) for end in ends])
        return torch.tensor(rows)[..., None].float(), whole

    def _next(self, text: str) -> int:
        text = text[-self.sight :]
        for size in range(min(40, len(text) - 1), 1, -1):
            at = text[:-1].rfind(text[-size:])
            if at >= 0:
                return ord(text[at + size])
        return 0

    def logits(self, features: Tensor) -> Tensor:
        return 20.0 * torch.nn.functional.one_hot(features[..., 0].long(), self.tokenizer.vocab_size).float()
