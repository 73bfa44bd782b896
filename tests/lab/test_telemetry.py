"""What a run records: against hand computation, over a resume, and as TensorBoard reads it back."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gecko_lab.build import build_config, build_model
from gecko_lab.components import Documents
from gecko_lab.components.ema.complex import half_life
from gecko_lab.components.registry import ATTENTION, EMA, MEMORY, NORM, Shape
from gecko_lab.telemetry import kinds, peak, probes
from gecko_lab.telemetry.curves import PositionLoss, bin_of, lower_edge
from gecko_lab.telemetry.flops import flops_per_token
from gecko_lab.telemetry.record import MetricsFile

SIZES = ["model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.z_dim=32", "model.value_dim=32",
         "model.chunk_size=16", "model.norm_groups=4", "model.ema_modes=4"]
RUN = [*SIZES, "data=text", "data.seq_len=64", "data.val_batches=2", "trainer.batch_size=2", "trainer.accelerator=cpu",
       "trainer.progress=false", "log.sample_tokens=0", "log.every_n_steps=2", "log.validate_every_n_steps=4",
       "checkpoint.every_n_steps=3", "trainer.max_steps=6"]
SHAPE = Shape(dim=8, z_dim=8, value_dim=8, num_heads=2, ffn_dim=8, chunk_size=4, ema_modes=2, norm_groups=2)
BOS = 256


def build(registry: Any, name: str) -> Any:
    return registry[name](registry[name].Config(), SHAPE)


# Curves


def test_bins_are_powers_of_two() -> None:
    positions = torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**38])
    edges = [lower_edge(i) for i in bin_of(positions).tolist()]
    assert edges == [0, 1, 2, 2, 4, 4, 8, 512, 1024, 2**38]


def test_loss_by_position_equals_a_direct_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    metric, sums = PositionLoss(), {}
    for _ in range(2):
        tokens = torch.randint(0, BOS, (3, 40), generator=generator)
        tokens[0, [0, 7, 8]], tokens[1, 33] = BOS, BOS
        losses = torch.rand(3, 40, generator=generator)
        metric.update(losses, tokens, BOS)
        for row in range(3):
            position = -1
            for t in range(40):
                position = 0 if tokens[row, t] == BOS else position + 1
                first = 0 if position == 0 else 2 ** int(math.log2(position))
                sums.setdefault(first, []).append(float(losses[row, t]))
    curve = metric.compute()
    assert [point["position"] for point in curve] == sorted(sums)
    for point in curve:
        assert point["tokens"] == len(sums[point["position"]])
        assert point["loss"] == pytest.approx(sum(sums[point["position"]]) / point["tokens"], rel=1e-6)


# FLOPs and speed


def counted(model: Any, length: int) -> float:
    """PyTorch's own count: matrix products, those of masked scores too."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, length, dtype=torch.int64))
    return counter.get_total_flops() / length


def test_flops_of_llama_are_what_pytorch_counts() -> None:
    model, length = build_model("model=llama"), 128
    above = 4 * (length - 1) / 2 * 2 * (128 + 128)  # layers, scores above the diagonal: computed, but no model FLOPs
    assert flops_per_token(model, length) + above == pytest.approx(counted(model, length), rel=1e-3)


@pytest.mark.parametrize("choice", ["gecko", "megalodon", "mega"])
def test_flops_of_the_others_are_within_a_few_percent(choice: str) -> None:
    model = build_model(f"model={choice}")
    assert flops_per_token(model, 256) == pytest.approx(counted(model, 256), rel=0.07)


def test_flops_by_hand() -> None:
    linear = 2 * (3 * 32 * 32 + 32 * 32 + 32 * 32 + 3 * 32 * 48)  # wv, wr, wh2; wz; wh1; the feed-forward
    near = 2 * 32.5 * 64  # chunks of 64 in a row of 64: (1 + .. + 64) / 64 keys
    ema, far = 12 * 32 * 4, 4 * 32 * 16 + 2 * 32 * 16 + 2 * 32 * 16 * 16 / 64
    model = build_model(*SIZES, "model.chunk_size=64", "model.num_heads=2")
    assert flops_per_token(model, 64) == pytest.approx(2 * (linear + near + ema + far) + 2 * 32 * 257)


def test_peak_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, file = torch.device("cpu"), tmp_path / "environment.json"
    file.write_text('[{"seed": 0}]')
    state, began = torch.get_rng_state(), time.perf_counter()
    found = peak.measure.__wrapped__(device, 0.05)
    assert time.perf_counter() - began < 10
    assert 1e8 < found < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(peak, "measure", lambda device: found)
    assert peak.of_run(file, device) == found
    monkeypatch.setattr(peak, "measure", lambda device: pytest.fail("measured again"))
    assert peak.of_run(file, device) == found
    assert json.loads(file.read_text())[0]["seed"] == 0


# Norms by kind


@pytest.mark.parametrize("choice", ["gecko", "mega", "llama"])
def test_norms_by_kind_cover_every_parameter_once(choice: str) -> None:
    model = build_model(f"model={choice}")
    model(torch.randint(0, 257, (1, 70)))[0].square().mean().backward()
    groups = kinds.parameters_by_kind(model)
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in model.parameters())
    for norms, whole in (
        (kinds.weight_norms(model), [p.detach() for p in model.parameters()]),
        (kinds.gradient_norms(model), [p.grad for p in model.parameters() if p.grad is not None]),
    ):
        assert sum(n**2 for n in norms.values()) == pytest.approx(sum(float(t.square().sum()) for t in whole), rel=1e-4)
    assert "weight/block" in kinds.weight_norms(model)
    if choice == "gecko":
        direct = math.sqrt(sum(float(p.detach().square().sum()) for b in model.blocks for p in b.cema.parameters()))
        assert kinds.weight_norms(model)["weight/ema"] == pytest.approx(direct, rel=1e-5)


# Probes


def test_half_life_and_frequency_of_known_modes() -> None:
    assert half_life(torch.tensor([0.5, 0.5 ** (1 / 8)])).tolist() == pytest.approx([1, 8], rel=1e-5)
    assert half_life(torch.tensor([1.0])).isfinite().all()
    ema = build(EMA, "complex")
    with torch.no_grad():
        ema.alpha.fill_(50.0)  # p = 1
        ema.delta.copy_(torch.logit(1 - 0.5 ** (1 / torch.tensor([10.0, 100.0]))).expand(8, 2))
        ema.theta.fill_(0.0)  # base phase 1/2 of 1/N turns
    found = ema.probe(torch.zeros(1, 1, 8), None, None)
    torch.testing.assert_close(found["half_life"], torch.tensor([10.0, 100.0]).expand(8, 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(found["frequency"], torch.tensor([0.25, 0.5]).expand(8, 2))


def test_statistics_that_the_norms_carry() -> None:
    x = torch.randn(2, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = x.unflatten(-1, (2, 4))
    norm = build(NORM, "timestep_decay").double()
    found = norm.probe(x, None, norm(x)[1])
    for name, beta, value in (("mean", 0.999, groups.mean(-1)), ("std", 0.9999, groups.var(-1, correction=0))):
        weight = beta ** torch.arange(29, -1, -1, dtype=torch.float64)
        expected = torch.einsum("t,btg->bg", weight, value) / weight.sum()
        torch.testing.assert_close(found[name], expected.sqrt() if name == "std" else expected, rtol=1e-6, atol=1e-9)
    norm = build(NORM, "timestep").double()
    found = norm.probe(x, None, norm(x)[1])
    torch.testing.assert_close(found["mean"], groups.mean((1, 3)))
    torch.testing.assert_close(found["std"], groups.transpose(1, 2).flatten(2).std(-1, correction=0))


def test_memory_writes_equal_chunks_with_falling_share() -> None:
    memory = build(MEMORY, "adaptive_working")
    aq, v = torch.zeros(1, 18, 2, 4), torch.randn(1, 18, 2, 4)
    ak = torch.randn(1, 4, 2, 4).repeat(1, 5, 1, 1)[:, :18]
    state = memory(aq, ak, v)[1]
    found = memory.probe(aq, ak, v, None, state)
    torch.testing.assert_close(found["write_share"].mean((1, 2)), 1 / torch.tensor([2.0, 3.0, 4.0]))
    torch.testing.assert_close(found["read_entropy"], torch.full((1, 18, 2), math.log(4)))
    torch.testing.assert_close(found["table_norm"], state.table.square().sum((2, 3)).sqrt())
    bos = torch.zeros(1, 18, dtype=torch.bool)
    bos[0, 9] = True  # within the third chunk, which therefore begins a table, and the fourth joins three tokens
    documents = Documents.from_bos(bos)
    found = memory.probe(aq, ak, v, documents, memory(aq, ak, v, documents)[1])
    mass, part = ak[0, :4].exp().sum(0), ak[0, 1:4].exp().sum(0)
    torch.testing.assert_close(found["write_share"], torch.stack([torch.full_like(mass, 0.5), mass / (mass + part)]))


@pytest.mark.parametrize("name", ATTENTION.names())
@pytest.mark.parametrize("packed", [False, True])
def test_attention_entropy_is_that_of_its_own_weights(name: str, packed: bool) -> None:
    generator, length = torch.Generator().manual_seed(0), 19
    q, k = (torch.randn(2, length, 2, 4, generator=generator) for _ in range(2))
    bos = torch.zeros(2, length, dtype=torch.bool)
    bos[:, [3, 14]] = True
    documents = Documents.from_bos(bos) if packed else None
    attention = build(ATTENTION, name).eval()
    each_key = torch.eye(length)[None, :, None].expand(2, -1, 2, -1)  # values that make the output the weights
    weights = attention.attend(q, k, each_key, documents, None)[0][0]
    expected = -torch.special.xlogy(weights, weights).sum(-1).T
    torch.testing.assert_close(attention.probe(q, k, each_key, documents, None)["entropy"], expected)


@pytest.mark.parametrize("choice", ["gecko", "megalodon", "mega", "llama"])
def test_probes_leave_the_model_as_it_was_and_are_cheap(choice: str) -> None:
    model = build_model(f"model={choice}").eval()
    tokens = torch.randint(0, 257, (8, 512), generator=torch.Generator().manual_seed(0))
    tokens[:, ::100] = BOS
    before, state = model(tokens[:1, :70])[0], torch.get_rng_state()
    began = time.process_time()
    found = probes.gather(model, tokens, BOS)
    assert time.process_time() - began < 4  # seconds of all threads; two of one were asked for
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(tokens[:1, :70])[0], before, rtol=0, atol=0)
    assert all("forward" not in m.__dict__ and "attend" not in m.__dict__ for m in model.modules())
    assert sorted({name.split("/")[0] for name in found}) == probes.names(model, torch.device("cpu"), BOS)
    assert "attention_entropy/layer_03" in found
    assert ("memory_write_share/layer_00" in found) == (choice == "gecko")
    assert all(p.isfinite().all() for p in found.values())


def test_quantiles() -> None:
    expected = {"min": 0, "q10": 10, "median": 50, "q90": 90, "max": 100}
    assert probes.summary(torch.arange(100, -1, -1.0)) == expected


# A run


def test_records_are_valid_json_and_rewind(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"a": math.nan, "b": [{"c": math.inf}], "d": 0.5})
    file.append(2, {"a": 1.0})
    with file.path.open("a") as out:
        out.write('{"step": 1, "tr')  # cut off by a kill
    assert file.rewind(1) == [{"step": 1, "a": None, "b": [{"c": None}], "d": 0.5}]
    assert file.path.read_text().count("\n") == 1


def start(folder: Path, text: Path, *overrides: str) -> list[dict[str, Any]]:
    from gecko_lab.train import train

    train(build_config(*RUN, f"data.path={text}", *overrides), folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"Document {i}. " + "The gecko climbs the wall and sees the moon. " * 9)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, start(folder, text)


def numbers(record: dict[str, Any]) -> list[float]:
    return [v for v in record.values() if isinstance(v, int | float)]


def test_records_of_a_run(run: tuple[Path, list[dict[str, Any]]]) -> None:
    _, records = run
    training, validations = ([r for r in records if name in r] for name in ("train/loss", "val/loss"))
    assert [r["step"] for r in training] == [2, 4, 6]
    assert [r["step"] for r in validations] == [4, 6]
    assert all(math.isfinite(n) for r in records for n in numbers(r))
    for record in training:
        assert record["progress/tokens"] == record["step"] * 2 * 64
        assert record["progress/flops"] == record["progress/tokens"] * 3 * flops_per_token(build_model(*SIZES), 64)
        flops_per_second = record["speed/tokens_per_second"] * 3 * flops_per_token(build_model(*SIZES), 64)
        assert record["speed/flops_per_second"] == pytest.approx(flops_per_second)
        assert 0 < record["speed/mfu"] < 2
        assert 0.05 < record["memory/peak_gib"] < 64
    for record in validations:
        curve = record["position_curve"]
        assert sum(p["tokens"] for p in curve) == 2 * 2 * 64
        mean = sum(p["tokens"] * p["loss"] for p in curve) / (2 * 2 * 64)
        assert mean == pytest.approx(record["val/loss"], rel=1e-5)
        assert record["val_position/00016"] == next(p["loss"] for p in curve if p["position"] == 16)
        whole = math.sqrt(sum(v**2 for k, v in record.items() if k.startswith("gradient/")))
        norm = next(r for r in training if r["step"] == record["step"])["train/gradient_norm"]
        assert whole == pytest.approx(norm, rel=1e-4)
        assert record["probe/ema_half_life/layer_01"] == record["probe_quantiles"]["ema_half_life/layer_01"]["median"]


def test_tensorboard_reads_the_run(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = run
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(math.isfinite(value) for points in scalars.values() for _, value in points)
    assert [step for step, _ in scalars["val/loss"]] == [4, 6]
    for record in records:
        for name, value in record.items():
            repeated = name.startswith("progress/") and "val/loss" in record  # a second axis for scripts only
            if name != "step" and isinstance(value, int | float) and not repeated:
                assert dict(scalars[name])[record["step"]] == pytest.approx(value, rel=1e-5)
    assert "probe_histogram/ema_half_life/layer_00" in events.Tags()["histograms"]

    def hparams(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    options = hparams("_hparams_/session_start_info").session_start_info.hparams
    assert options["model.dim"].number_value == 32
    assert options["model.attention.name"].string_value == "sliding_chunk"

    encoded = events.Tensors("custom_scalars__config__")
    assert len(encoded) == 1
    page = layout_pb2.Layout.FromString(encoded[0].tensor_proto.string_val[0])
    charts = {c.title: list(c.multiline.tag) for category in page.category for c in category.chart}
    assert charts["ema half life"] == ["^probe/ema_half_life/.*$"]
    assert charts["loss by position in the document"] == ["^val_position/.*$"]


def test_a_resumed_run_records_the_same(run: tuple[Path, list[dict[str, Any]]], text: Path, tmp_path: Path) -> None:
    whole, expected = run
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "step-00000006.ckpt").unlink()
    (folder / "checkpoints" / "best.ckpt").unlink()
    found = start(folder, text, "resume=auto")  # from step 3, in the middle of an interval

    def comparable(record: dict[str, Any]) -> dict[str, Any]:
        varies = ("speed/", "memory/", "progress/seconds")
        return {k: v for k, v in record.items() if not k.startswith(varies)}

    assert [comparable(r) for r in found] == [comparable(r) for r in expected]
    seconds = [r["progress/seconds"] for r in found]
    assert seconds == sorted(seconds)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]  # what the first process wrote later is purged


def test_probes_can_be_left_out(text: Path, tmp_path: Path) -> None:
    records = start(tmp_path / "run", text, "log.probes=false", "trainer.max_steps=2")
    assert not any(name.startswith("probe") and value for record in records for name, value in record.items())
    assert any("val_position/00000" in record for record in records)
