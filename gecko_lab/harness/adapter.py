"""The three requests of lm-evaluation-harness, answered by a model of the lab without a limit of length."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ..artifacts import open_artifact
from ..errors import LabError
from ..generation import Sampling, answers
from ..tasks import Subject, nothing
from ..tasks.base import Progress
from ..tasks.continuations import pair, score

LENGTH = 256  # tokens of an answer where a task does not say


@register_model("gecko_lab")
class HarnessModel(LM):
    """``lm_eval.simple_evaluate(model="gecko_lab", model_args="run=RUN")``, or ``HarnessModel.of(subject)``.

    Every text is read as a document from its first token on, long ones in pieces with the state carried: nothing is
    cut. Choices are scored by the same code as ``evaluate task=choice``.
    """

    def __init__(
        self, run: str, checkpoint: str = "best", device: str = "auto", precision: str | None = None, **_: Any
    ) -> None:
        """The harness's own batch_size and max_batch_size are accepted and not needed."""
        super().__init__()
        self._use(Subject.of(open_artifact(run, checkpoint), device, precision))

    @classmethod
    def of(cls, subject: Subject) -> HarnessModel:
        """For a model that is open already."""
        made = cls.__new__(cls)
        LM.__init__(made)
        made._use(subject)
        return made

    def _use(self, subject: Subject) -> None:
        self.subject = subject
        self.progress: Progress = nothing
        self._device = subject.device

    def watched(self, progress: Progress) -> HarnessModel:
        """The same, telling ``progress`` of scored texts."""
        self.progress = progress
        return self

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.fingerprint

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._scored([(str(r.args[0]), str(r.args[1])) for r in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [nats for nats, _ in self._scored([("", str(r.args[0])) for r in requests])]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            options: dict[str, Any] = dict(request.args[1])
            until = options.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
            key = (stops, int(options.get("max_gen_toks", LENGTH)), temperature, float(options.get("top_p", 1.0)))
            groups.setdefault(key, []).append(index)
        found, done = [""] * len(requests), 0
        for (stops, length, temperature, top_p), members in groups.items():
            texts = [str(requests[i].args[0]) for i in members]
            sampling = Sampling(temperature=temperature, top_p=top_p)
            with self.subject.inference():
                for answer in answers(
                    self.subject.model, self.subject.tokenizer, texts, length, sampling=sampling, stop=stops
                ):
                    found[members[answer.prompt]] = answer.text
                    done += 1
                    self.progress(done, len(requests))
        return found

    def _scored(self, texts: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        found = score(self.subject, [pair(self.subject.tokenizer, *both) for both in texts], self.progress)
        return [(-float(nats), bool(exact)) for nats, exact in zip(found.nats, found.exact)]


def choice_task(name: str, file: str) -> dict[str, Any]:
    """A harness task over a .jsonl file of rows {query, choices, gold}, as ``evaluate task=choice`` reads them."""
    from ..tasks.choice import FORM, question
    from ..tasks.files import read_rows

    rows = read_rows("choice", file, FORM)
    for row in rows:
        if "query" not in row:
            raise LabError(f"{row['where']}: --choice reads rows {{query, choices, gold}}; try evaluate task=choice")
        question(row, " ")
    kept = [{"query": r["query"], "choices": r["choices"], "gold": int(r["gold"])} for r in rows]
    return {
        "task": name,
        "custom_dataset": lambda **_: _dataset(kept),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }


def _dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(rows)})
