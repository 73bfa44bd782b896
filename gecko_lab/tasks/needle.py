"""Needles in a haystack after RULER's task definitions (Hsieh et al., 2024), and its variable tracking.

The definitions are theirs, the sentences our own, so scores do not compare with published ones.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..components.registry import nearest, option
from ..errors import LabError
from .base import TASKS
from .haystack import Item, Question
from .retrieval import Retrieval, RetrievalConfig

KINDS = ("single", "multikey", "multivalue", "multiquery", "tracking")
VALUES = ("number", "word", "uuid")
HAY = ("filler", "text", "needles")
NOUNS = """
amber anchor apple arrow autumn badger bamboo barley basket beacon berry birch blanket bottle branch bridge bronze
bucket butter button cabin camel candle canyon carpet castle cedar cello cherry chisel cinder clover cobalt comet
copper coral cotton cradle crystal dagger daisy desert dragon drummer eagle ember engine falcon feather fiddle flint
forest fossil fountain garden ginger glacier granite hammer harbor hazel helmet heron honey island ivory jacket
jasmine kettle ladder lantern laurel lemon lily linen lizard lobster magnet maple marble meadow mirror mosaic needle
nutmeg oyster paddle palace pebble pepper pigeon pillow planet plum pocket quartz rabbit raven ribbon river rocket
saddle salmon scarlet shadow silver sparrow spruce summit tiger timber tulip tunnel turtle valley velvet violin
walnut willow window winter yellow zephyr
"""
WORDS = tuple(NOUNS.split())


@TASKS.register("needle")
class Needle(Retrieval):
    """single: one needle. multikey: others like it beside the one that is asked for. multivalue: one key has several
    values, all asked for. multiquery: several keys, each asked for. tracking: a chain of assignments through the
    haystack, all variables of the chain asked for."""

    @dataclass
    class Config(RetrievalConfig):
        name: str = option("needle", "needles in a haystack (several keys, values, queries) and variable tracking")
        kind: str = option("single", "single, multikey, multivalue, multiquery or tracking")
        haystack: str | None = option(None, "filler, text or needles (nothing but distractors); null: text with data")
        value: str = option("number", "what is hidden: number, word or uuid")
        digits: int = option(7, "of a number")
        keys: int = option(4, "multikey: needles in all, the others distract")
        values: int = option(4, "multivalue: values of the key")
        queries: int = option(4, "multiquery: keys, all of them asked for")
        chains: int = option(1, "tracking: chains of assignments, the first is asked for")
        hops: int = option(4, "tracking: assignments after the first")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        given = config.haystack or ("filler" if config.data is None else "text")
        for name, value, allowed in (("kind", config.kind, KINDS), ("value", config.value, VALUES),
                                     ("haystack", given, HAY)):  # fmt: skip
            if value not in allowed:
                raise LabError(f"{name}={value}: unknown. {nearest(value, list(allowed))}")
        if (given == "text") != (config.data is not None):
            raise LabError(
                f"haystack={given} with data={config.data}: data=FILE is the text of haystack=text, and only of it"
            )
        if given == "needles" and config.kind == "tracking":
            raise LabError("haystack=needles kind=tracking: tracking takes filler or text")
        for name in ("digits", "keys", "values", "queries", "chains", "hops"):
            if getattr(config, name) < 1:
                raise LabError(f"{name}={getattr(config, name)}: must be at least 1")
        for name, limit in (("keys", 20), ("queries", 20), ("values", 100)):
            if getattr(config, name) > limit:
                raise LabError(f"{name}={getattr(config, name)}: at most {limit}")
        self.given, self.spread = given, config.kind in ("multivalue", "multiquery", "tracking")

    def item(self, random: np.random.Generator, depth: float | None) -> Item:
        if self.config.kind == "tracking":
            return self._tracking(random)
        c = self.config
        count = {"single": 1, "multikey": c.keys, "multivalue": 1, "multiquery": c.queries}[c.kind]
        names = [WORDS[i] for i in random.permutation(len(WORDS))]
        keys, others = names[:count], names[count:]
        held = {
            k: [self._value(random, others) for _ in range(c.values if c.kind == "multivalue" else 1)] for k in keys
        }
        places = iter(random.random(count * c.values).tolist())
        needles = []
        for i, key in enumerate(keys):
            for value in held[key]:
                at = depth if depth is not None and i == 0 else next(places)
                needles.append((f"\n{self._sentence(key, value)}\n", at))
        asked = keys if c.kind == "multiquery" else keys[:1]
        order = dict(needles)
        questions = []
        for key in asked:
            values = sorted(held[key], key=lambda v: order[f"\n{self._sentence(key, v)}\n"])
            many = "s" if len(values) > 1 else ""
            verb = "are" if many else "is"
            ask = f"\nWhich magic {c.value}{many} of {key} did the text name? The magic {c.value}{many} of {key} {verb}"
            questions.append(Question(ask, " " + ", ".join(values), tuple(values)))
        noise: tuple[str, ...] = ()
        if self.given == "needles":
            used = set(keys)
            rest = [w for w in others if w not in used]
            noise = tuple(self._sentence(k, self._value(random, others)) + "\n" for k in rest)
        return Item(tuple(needles), tuple(questions), noise=noise)

    def _sentence(self, key: str, value: str) -> str:
        return f"The magic {self.config.value} of {key} is {value}."

    def _value(self, random: np.random.Generator, words: list[str]) -> str:
        if self.config.value == "word":
            return words.pop(int(random.integers(len(words))))
        if self.config.value == "uuid":
            return str(uuid.UUID(bytes=random.bytes(16), version=4))
        first, *rest = random.integers(0, 10, self.config.digits).tolist()
        return "".join(str(d) for d in (max(first, 1), *rest))

    def _tracking(self, random: np.random.Generator) -> Item:
        c, needles, chains = self.config, [], []
        chain = 1 + c.hops
        names = _variables(random, c.chains * chain)
        for k in range(c.chains):
            mine = names[k * chain : (k + 1) * chain]
            value = "".join(str(d) for d in random.integers(1, 10, c.digits))
            places = np.sort(random.random(chain)).tolist()
            texts = [f"\nVariable {mine[0]} becomes {value}.\n"]
            texts += [f"\nVariable {b} becomes {a}.\n" for a, b in pairwise(mine)]
            needles += list(zip(texts, places))
            chains.append((value, mine))
        value, mine = chains[0]
        ask = f"\nWhich {chain} variables hold {value}, directly or through others? They are"
        return Item(tuple(needles), (Question(ask, " " + ", ".join(mine), tuple(mine)),))

    def chance(self) -> float:
        if self.config.kind == "tracking":
            return 0.0
        one = {"number": 10.0**-self.config.digits, "word": 1.0 / len(WORDS), "uuid": 2.0**-122}[self.config.value]
        return float(one ** (self.config.values if self.config.kind == "multivalue" else 1))

    def title(self) -> str:
        c = self.config
        return {
            "single": f"the {c.value} of the one key",
            "multikey": f"the {c.value} of one of {c.keys} keys",
            "multivalue": f"{c.values} {c.value}s of one key",
            "multiquery": f"the {c.value}s of {c.queries} keys",
            "tracking": f"variables of a chain of {c.hops} hops, one of {c.chains}",
        }[c.kind]


def _variables(random: np.random.Generator, count: int) -> list[str]:
    """Different names of five capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(65 + i) for i in random.integers(0, 26, 5))] = None
    return list(found)
