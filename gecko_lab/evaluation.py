"""How well a trained model predicts a text: the numbers of the evaluate command, for rows or whole documents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .artifacts import Artifact, device_named
from .components import Documents
from .components import state as states
from .config import TrainConfig, TrainerConfig
from .data import corpora
from .data.batches import Batch, ValBatches
from .data.config import DataConfig
from .data.errors import DataError
from .data.module import LabData
from .data.rows import PackedRows, TokenStream
from .data.source import TokenSource, join
from .data.store import MANIFEST, open_store
from .data.synthetic import SyntheticConfig
from .data.tokenizers import Tokenizer
from .errors import LabError
from .kernels import backend
from .lit import LitLanguageModel
from .metrics import LanguageMetrics
from .model import LanguageModel
from .precision import MatricesInBF16, resolve
from .telemetry.curves import BINS, bin_of, lower_edge


@dataclass
class Text:
    """What is read: documents, their name in messages, their split, and the fingerprint of the whole data if known."""

    source: TokenSource
    name: str
    split: str
    fingerprint: str | None = None


class Part(NamedTuple):
    """Some targets: their nats and positions (both of one shape), and the bytes of text that they stand for."""

    losses: Tensor
    positions: Tensor
    size: Tensor | int


class Work(NamedTuple):
    """What will be read: how many batches and targets, and the parts themselves as they are made."""

    batches: int
    targets: int
    parts: Iterator[Part]


@dataclass
class Tally:
    """Sums over all targets, and by position in the document (the bins of ``telemetry.curves``)."""

    metrics: LanguageMetrics = field(default_factory=LanguageMetrics)
    nats: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, part: Part) -> None:
        losses, bins = part.losses.cpu(), bin_of(part.positions.cpu()).flatten().numpy()
        self.metrics.update(losses, part.size)
        self.nats += np.bincount(bins, losses.double().flatten().numpy(), BINS)
        self.tokens += np.bincount(bins, minlength=BINS)

    def results(self) -> dict[str, Any]:
        """Plain values: loss (nats a token), perplexity, bits_per_byte, tokens, bytes, and the list ``by_position``."""
        values: dict[str, Any] = {k: float(v) for k, v in self.metrics.compute().items()}
        values |= {"tokens": int(self.metrics.tokens), "bytes": int(self.metrics.bytes)}
        values["by_position"] = [
            {"from": lower_edge(i), "to": lower_edge(i + 1) - 1, "tokens": int(n), "loss": float(self.nats[i] / n)}
            for i, n in enumerate(self.tokens)
            if n
        ]
        return values


def evaluate(
    artifact: Artifact,
    data: str | None = None,
    split: str | None = None,
    *,
    seq_len: int | None = None,
    batches: int | None = None,
    batch_size: int | None = None,
    stream: bool = False,
    device: str = "auto",
    precision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The numbers of the command as plain values; see its ``--help`` for the arguments.

    Raises LabError for data that are missing, too short or made with another tokenizer, and for impossible numbers.
    """
    own = artifact.training
    trainer = own.trainer if own else TrainerConfig()
    for name, value, lowest in (("seq-len", seq_len, 1), ("batch-size", batch_size, 1), ("batches", batches, 0)):
        if value is not None and value < lowest:
            raise LabError(f"--{name} {value}: must be at least {lowest}")
    tokenizer = artifact.tokenizer()
    text = find_text(artifact, data, split, tokenizer)
    length = seq_len or (own.data.seq_len if own else artifact.seq_len) or DataConfig().seq_len
    rows = batch_size or trainer.batch_size
    ranks = trainer.devices * trainer.num_nodes if batch_size is None else 1
    limit = batches if batches is not None else (own.data if own and data is None else DataConfig()).val_batches

    model, where, precision = prepared(artifact, device, precision)
    with torch.device("meta"):
        module = LitLanguageModel(TrainConfig(model=artifact.model.config, trainer=trainer), bos_id=tokenizer.bos_id)
    module.model = model
    if stream:
        work = document_batches(text.source, tokenizer, rows, limit, module, length)
    else:
        work = packed_batches(text.source, tokenizer, rows, ranks, limit, module, length)

    tally, began, done = Tally(), perf_counter(), 0
    progress(0, work.targets)
    with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, enabled=precision != "32-true"):
        for part in work.parts:
            tally.add(part)
            done += part.losses.numel()
            progress(done, work.targets)
    seconds = perf_counter() - began
    results = tally.results()
    return {
        **results,
        "tokens_per_second": results["tokens"] / seconds,
        "seconds": seconds,
        "checkpoint": str(artifact.file),
        "step": artifact.step,
        "data": text.name,
        "split": text.split,
        "documents": text.source.documents,
        "text_fingerprint": text.source.fingerprint,
        "data_fingerprint": text.fingerprint,
        "trained_on_fingerprint": artifact.data_fingerprint,
        "seq_len": length,
        "batch_size": rows,
        "batches": work.batches,
        "stream": stream,
        "device": str(where),
        "precision": precision,
    }


def prepared(
    artifact: Artifact, device: str = "auto", precision: str | None = None
) -> tuple[LanguageModel, torch.device, str]:
    """The model on its device and in its precision (None: as it was trained), the device, and the precision's name."""
    own = artifact.training
    where = device_named(device)
    backend.set_mode(own.kernels if own else "auto")
    precision = resolve(precision or (own.trainer if own else TrainerConfig()).precision, where.type)
    model = artifact.model.to(where)
    if precision == "bf16-true":
        model = MatricesInBF16(where.type).convert_module(copy.deepcopy(model))  # type: ignore[assignment]
    return model, where, precision


def find_text(artifact: Artifact | None, data: str | None, split: str | None, tokenizer: Tokenizer) -> Text:
    """The documents that ``data`` and ``split`` name (as options, or as fields of a task); None: the run's own."""
    if data is None or data == "stdlib":
        training = None if artifact is None else artifact.training
        if data is None and training is None:
            raise LabError(
                f"{artifact.file if artifact else 'this model'}: nothing beside it says where its data lie; give "
                "--data (data= of a task): stdlib, a file or folder of text, or a token store"
            )
        config = training.data if data is None and training else DataConfig(tokenizer=tokenizer.name)
        if isinstance(config, SyntheticConfig):
            raise LabError(f"this run was trained on data={config.name}, which is no text; add task=recall")
        name = "stdlib" if config.name == "stdlib" else str(config.path or config.mixture)
        lab = LabData(replace(config, seq_len=1), seed=0, batch_size=1)  # short rows: how they are cut comes later
        try:
            lab.setup()
        except DataError as error:
            hint = (
                "" if data else "; a relative path counts from the folder of the run's start; or give --data, data="
            )
            raise DataError(f"{error}{hint}") from None
        chosen = split or "val"
        parts = [*(lab.sources if chosen != "val" else []), *([lab.val_source] if chosen != "train" else [])]
        return Text(parts[0] if len(parts) == 1 else join(parts), name, chosen, lab.fingerprint)
    if (Path(data) / MANIFEST).exists():
        store = open_store(data)
        if store.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{data}: prepared with the tokenizer {store.manifest['tokenizer']['name']}, the "
                f"model was trained with {tokenizer.name}"
            )
        parted = store.split()
        chosen = split or ("all" if parted.val is None else "val")
        whole = store.everything()
    else:
        chosen = split or "all"
        parted = corpora.text(data, tokenizer, DataConfig().text_field, None, hold_out=chosen != "all")
        whole = parted.train
    source = {"train": parted.train, "val": parted.val, "all": whole}[chosen]
    if source is None or not source.documents:
        raise DataError(f"{data}, split {chosen}: there are no documents in this part; try split all")
    return Text(source, data, chosen)


def packed_batches(
    source: TokenSource, tokenizer: Tokenizer, rows: int, ranks: int, limit: int, module: LitLanguageModel, length: int
) -> Work:
    """The batches of a run's validation on ``ranks`` processes: rows of packed documents, each from a fresh state."""
    packed = PackedRows(TokenStream(source, tokenizer.bos_id, seed=0, shuffle=False), length, rows, shuffle=False)
    try:
        shares = [ValBatches(packed, tokenizer, rows, rank, ranks, limit) for rank in range(ranks)]
    except DataError:
        raise DataError(
            f"too little text: {packed.stream.tokens:,} tokens do not fill {ranks} row(s) of {length}; give a smaller "
            "--seq-len, other --data, or read whole documents with --stream"
        ) from None

    def losses(batch: Batch) -> Part:
        batch = {k: v.to(module.model.embed.weight.device) for k, v in batch.items()}
        positions = Documents.from_tokens(batch["tokens"], tokenizer.bos_id).positions
        return Part(module.losses(batch)[0], positions, batch["bytes"].cpu())

    count = len(shares[0])
    targets = count * shares[0].every * length
    return Work(count, targets, (losses(share[step]) for step in range(count) for share in shares))


def document_batches(
    source: TokenSource, tokenizer: Tokenizer, rows: int, limit: int, module: LitLanguageModel, length: int
) -> Work:
    """Whole documents, ``rows`` of similar length side by side, ``length`` tokens at a time with the state carried."""
    wanted = min(source.documents, limit * rows if limit else source.documents)
    chosen = np.arange(wanted) * source.documents // wanted  # spread evenly
    chosen = chosen[source.lengths[chosen] > 0]
    chosen = chosen[np.argsort(-source.lengths[chosen], kind="stable")]
    groups = [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
    parts = (part for group in groups for part in _read_documents(source, tokenizer, group, module, length))
    return Work(len(groups), int(source.lengths[chosen].sum()), parts)


def _read_documents(
    source: TokenSource, tokenizer: Tokenizer, group: np.ndarray, module: LitLanguageModel, length: int
) -> Iterator[Part]:
    device = module.model.embed.weight.device
    starts, lengths = source.starts[group], source.lengths[group]  # longest first
    state: Any = None
    for begin in range(0, int(lengths[0]), length):
        alive = int((lengths > begin).sum())
        if state is not None:
            state = states.rows(state, slice(0, alive))
        width = int(min(length, lengths[0] - begin))
        block = np.zeros((alive, width + 1), dtype=np.int64)  # what follows a document's end is read and not counted
        for row, (start, size) in enumerate(zip(starts[:alive].tolist(), lengths[:alive].tolist())):
            stop = min(begin + width, size)
            block[row, 0] = tokenizer.bos_id if begin == 0 else source.tokens[start + begin - 1 : start + begin][0]
            block[row, 1 : 1 + stop - begin] = source.tokens[start + begin : start + stop]
        tokens = torch.from_numpy(block).to(device)
        losses, state = module.losses({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": 0}, state)
        real = np.arange(width) < (lengths[:alive, None] - begin)
        size = int(tokenizer.byte_lengths[block[:, 1:][real]].sum())
        size -= alive * tokenizer.prefix_bytes if begin == 0 else 0
        positions = torch.arange(begin, begin + width).expand(alive, width)
        mask = torch.from_numpy(real)
        yield Part(losses.cpu()[mask], positions[mask], size)
