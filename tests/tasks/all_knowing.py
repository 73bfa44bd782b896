"""A model that has read and understood everything: it finds the answer in the text with regular expressions."""

import re
from typing import Any

import torch
from torch import Tensor

from gecko_lab.tasks import Subject


def solve(text: str) -> str:
    """What comes after ``text``, which ends inside the answer or right before it."""
    if "What is the pass key? The pass key is" in text:
        before, said = text.rsplit("The pass key is", 1)
        return answer(" " + known[0] if (known := re.findall(r"The pass key is (\d+)\.", before)) else "", said)
    if found := re.search(r"The magic (\w+?)s? of (\w+) (?:is|are)((?: [\w-]+,?)*(?: [\w-]*)?|)$", text):
        kind, key, said = found.groups()
        values = re.findall(rf"The magic {kind} of {key} is ([\w-]+)\.", text)
        return answer(" " + ", ".join(values), said)
    if found := re.search(r"hold (\d+), directly or through others\? They are(.*)$", text):
        chain = re.findall(rf"Variable (\w+) becomes {found[1]}\.", text)
        while chain and (more := re.findall(rf"Variable (\w+) becomes {chain[-1]}\.", text)):
            chain.append(more[0])
        return answer(" " + ", ".join(chain), found[2]) if chain else ""
    return ""


def answer(whole: str, said: str) -> str:
    return whole[len(said) :] if whole.startswith(said) else ""


class Oracle(Subject):
    """``state`` is the text (B, n) read so far; the features are the logits."""

    window = 64  # type: ignore[assignment]

    def features(self, tokens: Tensor, state: Any = None, bos_id: Any = -1) -> tuple[Tensor, Any]:
        past = 0 if state is None else state.shape[1]
        seen = tokens if state is None else torch.cat([state, tokens], 1)
        logits = torch.zeros(*tokens.shape, 257)
        logits[..., 0] = 1.0
        for row in range(len(tokens)) if tokens.shape[1] < 120 else ():  # answers and questions, not the haystack
            for place in range(past, seen.shape[1]):
                text = bytes(t for t in seen[row, : place + 1].tolist() if t < 256).decode()
                if rest := solve(text):
                    logits[row, place - past, rest.encode()[0]] = 50.0
        return logits, seen

    def logits(self, features: Tensor) -> Tensor:
        return features
