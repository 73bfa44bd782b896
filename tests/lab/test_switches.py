"""Precision, chunked logits, compilation and the meta device: what each switch may and may not change."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gecko_lab
from gecko_lab.build import build_config
from gecko_lab.components import Documents
from gecko_lab.components import state as states
from gecko_lab.errors import ConfigError
from gecko_lab.loss import token_losses
from gecko_lab.pieces import row_losses
from gecko_lab.precision import MatricesInBF16, resolve

FAMILIES = ["gecko", "megalodon", "mega", "llama"]
SMALL = ["model.num_layers=1", "model.dim=32", "model.ffn_dim=48", "model.chunk_size=16", "model.ema_modes=2"]


def model_of(family: str, *more: str) -> gecko_lab.LanguageModel:
    torch.manual_seed(0)
    return gecko_lab.build_model(f"model={family}", *SMALL, *more)


def a_batch(length: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.randint(0, 256, (2, length + 1), generator=torch.Generator().manual_seed(1))
    row[:, 0], row[0, 20] = 256, 256
    return row[:, :-1], row[:, 1:]


def head_inputs(
    dtype: torch.dtype, rows: int = 3, length: int = 11, dim: int = 8, vocab: int = 29
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, dim, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    return [x, w, torch.randint(0, vocab, (rows, length), generator=generator)]


@pytest.mark.parametrize("chunk", [0, 1, 4, 7, 32, 33, 1000])
def test_chunked_logits_give_the_losses_and_gradients_of_all_logits(chunk: int) -> None:
    x, w, y = head_inputs(torch.float64)
    scale = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).view_as(y)
    plain = F.cross_entropy((x @ w.T).flatten(0, 1), y.flatten(), reduction="none").view_as(y)
    expected = torch.autograd.grad((plain * scale).sum(), [x, w])
    losses = token_losses(x, w, y, chunk)
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad((losses * scale).sum(), [x, w]), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_chunked_logits_under_autocast_are_bf16_products_with_a_float32_softmax() -> None:
    x, w, y = head_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cut, whole = token_losses(x, w, y, 7), token_losses(x, w, y, 0)
    exact = F.cross_entropy((x.bfloat16() @ w.bfloat16().T).float().flatten(0, 1), y.flatten(), reduction="none")
    assert cut.dtype == torch.float32
    torch.testing.assert_close(cut.flatten(), exact)
    torch.testing.assert_close(cut, whole)
    a, b = torch.autograd.grad(cut.sum(), [x, w]), torch.autograd.grad(whole.sum(), [x, w])
    for part, all_ in zip(a, b):
        assert part.dtype == torch.float32
        assert float((part - all_).norm() / all_.norm()) < 0.02


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes that tensors made during ``work`` held at one time, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_all_logits_never_exist_at_once() -> None:
    x, w, y = head_inputs(torch.float32, rows=2, length=512, dim=16, vocab=2000)
    logits = 2 * 512 * 2000 * 4

    def step(chunk: int) -> Callable[[], None]:
        return lambda: token_losses(x, w, y, chunk).mean().backward()

    assert peak_bytes(step(0)) > logits
    assert peak_bytes(step(64)) < logits / 3


def test_precision_auto_depends_on_the_device() -> None:
    assert resolve("auto", "cpu") == "32-true"
    assert resolve("auto", "auto") == ("bf16-mixed" if torch.cuda.is_available() else "32-true")
    assert resolve("bf16-true", "cpu") == "bf16-true"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_true_stores_matrices_in_bf16_and_states_in_float32(family: str) -> None:
    model, plain = model_of(family), model_of(family)
    plugin = MatricesInBF16("cpu")
    plugin.convert_module(model)
    matrices = {id(p) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) for p in m.parameters()}
    assert {p.dtype for p in model.parameters() if id(p) in matrices} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if id(p) not in matrices} <= {torch.float32}
    with plugin.forward_context():
        losses, state = row_losses(model, *a_batch(), bos_id=256)
    losses.mean().backward()
    with torch.no_grad():  # as the sample at a run's end reads it, without the trainer's context
        bare, _ = row_losses(model, *a_batch(), bos_id=256)
    assert float((bare - losses.detach()).abs().mean()) < 0.1
    exact, like = row_losses(plain, *a_batch(), bos_id=256)
    assert losses.dtype == torch.float32
    assert float((losses - exact).abs().mean()) < 0.1
    for block, other in zip(state.blocks, like.blocks):
        for name in ("norm", "ema", "memory"):
            for a, b in zip(states.tensors(getattr(block, name)), states.tensors(getattr(other, name)), strict=True):
                assert a.dtype == b.dtype  # float32, complex64 and counters, as without bf16


@pytest.mark.parametrize(
    "override", ["trainer.precision=fp16", "trainer.piece_len=-1", "trainer.loss_chunk=-4"]
)
def test_impossible_switches_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        build_config(override)


def test_sharding_refuses_two_types_in_a_block() -> None:
    with pytest.raises(ConfigError, match="bf16-mixed"):
        build_config("trainer.strategy=fsdp", "trainer.precision=bf16-true")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_memory_runs_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        model = model_of(family)
    tokens = torch.zeros(2, 70, dtype=torch.int64, device="meta")
    losses, _ = row_losses(model, tokens, tokens, piece_len=33)
    assert losses.shape == (2, 70)
    assert losses.device.type == "meta"


def test_with_documents_only_the_layout_of_the_moving_average_breaks_the_graph() -> None:
    """How many chunks documents fill is read from the tokens; the reference needs it as a number."""
    bos = torch.zeros(2, 48, dtype=torch.bool)
    bos[0, 20] = True
    torch._dynamo.reset()
    found = torch._dynamo.explain(model_of("gecko").blocks[0])(torch.randn(2, 48, 32), Documents.from_bos(bos), None)
    torch._dynamo.reset()
    assert {reason.user_stack[-1].name for reason in found.break_reasons} == {"layout_of"}


@pytest.mark.parametrize(("family", "bos_id", "backend"), [("gecko", None, "eager"), ("llama", 256, "aot_eager")])
def test_a_compiled_block_is_one_graph_and_gives_the_same_gradients_along_a_stream(
    family: str, bos_id: int | None, backend: str
) -> None:
    eager, compiled = model_of(family), model_of(family)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for block in compiled.blocks:
            block.compile(backend=backend, fullgraph=True)
        a = b = None
        for _ in range(3):  # the position in the stream is a Python number: it must not recompile for ever
            x, y = a_batch(32)
            eager.zero_grad()
            compiled.zero_grad()
            one, a = row_losses(eager, x, y, a, bos_id)
            two, b = row_losses(compiled, x, y, b, bos_id)
            one.mean().backward()
            two.mean().backward()
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
            for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
            a, b = states.detach(a), states.detach(b)
    torch._dynamo.reset()
