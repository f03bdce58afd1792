"""The fused log-probability kernels against fp64 softmax of the same bf16 logits."""

import pytest
import torch
from fused_operators import fresh_leaves
from torch import Tensor

from src import quant
from src.losses import sft_loss
from src.ops import token_logps as module
from src.ops.token_logps import head_sft_loss, token_logps
from src.quant import DequantizationWorkspace, FrozenHead

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def inputs(rows: int, channels: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, channels, generator=generator, device="cuda").bfloat16()
    weight = (2 * torch.randn(vocabulary, channels, generator=generator, device="cuda") / channels**0.5).bfloat16()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    targets[1::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk_tokens"), [(1, 264, None), (37, 512, 16), (70, 257, 32), (67, 65536, 32)]
)
def test_values_and_gradients(
    rows: int, vocabulary: int, chunk_tokens: int | None, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_kernels:
        monkeypatch.setattr(module, "fused_kernels", lambda: None)
    hidden, weight, targets = inputs(rows, 128, vocabulary)
    counted = targets >= 0
    by_logp, by_max = torch.randn(2, rows, device="cuda")

    ours_hidden, ours_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, max_logit = token_logps(ours_hidden, ours_weight, targets, chunk_tokens=chunk_tokens)
    ((logp * by_logp).sum() + (max_logit * by_max).sum()).backward()

    # The logits rounded to bf16 as in the chunks, everything else in fp64.
    logits = (hidden @ weight.t()).double().requires_grad_()
    all_logps = torch.log_softmax(logits, -1)
    expected = torch.where(counted, all_logps.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
    expected_max = torch.where(counted, logits.max(-1).values, 0.0)
    ((expected * by_logp).sum() + (expected_max * by_max).sum()).backward()
    assert logits.grad is not None

    # The kernel sums in fp32: most rows agree to 1e-5. A chunked product may round a logit to the next bf16 value
    # (2^-8 of it), which the looser bound allows.
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=2e-2)
    assert (logp.double() - expected).abs().median() < 1e-5
    torch.testing.assert_close(max_logit.double(), expected_max, rtol=1e-2, atol=0)
    for ours, reference in (
        (ours_hidden.grad, logits.grad @ weight.double()),
        (ours_weight.grad, logits.grad.t() @ hidden.double()),
    ):
        assert ours is not None
        # Two roundings to bf16, of the logits' gradient and of the result: 0.0017 each, times two.
        assert ((ours.double() - reference).norm() / reference.norm()).item() < 5e-3
    assert not ours_hidden.grad[~counted].any()  # type: ignore[index]


def test_statistics_and_gradient_of_given_logits() -> None:
    """The kernels alone, on hard rows: ties, one value far above, a wide range, equal values."""
    kernels = module.fused_kernels()
    assert kernels is not None
    vocabulary = 4096
    logits = torch.randn(6, vocabulary, device="cuda").mul_(3).bfloat16()
    logits[1, 17] = logits[1, 3000] = 50.0
    logits[2] = 7.0
    logits[3, -1] = 300.0
    logits[4] = torch.linspace(-500, 500, vocabulary, device="cuda").bfloat16()
    targets = torch.tensor([5, 17, 0, 1, vocabulary - 1, -100], device="cuda")
    logp, max_logit, logsumexp = torch.full((3, 6), torch.nan, device="cuda").unbind(0)
    argmax = torch.full((6,), -7, dtype=torch.int32, device="cuda")
    kernels.logit_statistics(logits, targets, logp, max_logit, logsumexp, argmax)

    wide = logits.double()
    torch.testing.assert_close(logsumexp.double(), wide.logsumexp(-1), rtol=1e-5, atol=1e-5)
    expected = torch.log_softmax(wide, -1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    expected[5] = 0
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=5e-5)
    assert torch.equal(argmax[[1, 2, 3]].cpu(), torch.tensor([17, 0, vocabulary - 1], dtype=torch.int32))
    assert torch.equal(max_logit[:5], logits[:5].max(-1).values.float())
    assert max_logit[5] == 0

    by_logp, by_max = torch.randn(2, 6, device="cuda").unbind(0)
    gradient = -by_logp.double().unsqueeze(1) * torch.softmax(wide, -1)
    rows = torch.arange(6, device="cuda")
    gradient[rows, targets.clamp(min=0)] += by_logp.double()
    gradient[rows, argmax.long()] += by_max.double()
    gradient[5] = 0
    ours = logits.clone()
    kernels.logit_gradient(ours, targets, logsumexp, argmax, by_logp, by_max)
    torch.testing.assert_close(ours.double(), gradient, rtol=8e-3, atol=1e-5)
    assert not ours[5].any()


def test_non_finite_logits_are_seen() -> None:
    hidden, weight, targets = inputs(8, 128, 512)
    hidden[0, 0] = torch.nan
    logp, _ = token_logps(hidden, weight, targets)
    assert logp[0].isnan()
    assert logp[2:].isfinite().all()


def test_two_runs_are_bitwise_equal() -> None:
    hidden, weight, targets = inputs(67, 128, 65536)
    results = []
    for _ in range(2):
        h = hidden.clone().requires_grad_()
        logp, max_logit = token_logps(h, weight, targets, chunk_tokens=32)
        (logp.sum() + max_logit.square().sum()).backward()
        results.append((logp, max_logit, h.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_memory_is_one_chunk_of_bf16_logits() -> None:
    hidden, weight, targets = inputs(2048, 128, 65536)
    hidden.requires_grad_()
    token_logps(hidden[:1], weight, targets[:1])[0].sum().backward()  # cuBLAS allocates its workspaces at first use
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, max_logit = token_logps(hidden, weight, targets, chunk_tokens=256)
    (logp.sum() + max_logit.square().sum()).backward()
    chunk_bytes = 256 * 65536 * 2
    assert torch.cuda.max_memory_allocated() - before < 1.2 * chunk_bytes


def test_sft_loss_with_its_head_is_the_loss_of_token_logps() -> None:
    hidden, weight, targets = inputs(67, 128, 65536)
    results = []
    for fused in (True, False):
        h = hidden.clone().requires_grad_()
        if fused:
            loss = head_sft_loss(h, weight, targets, chunk_tokens=32)
        else:
            logp, max_logit = token_logps(h, weight, targets, chunk_tokens=32)
            loss = sft_loss(logp, max_logit, targets >= 0)
        loss.backward()
        results.append((loss.detach(), h.grad))
    (loss, grad), (expected_loss, expected_grad) = results
    torch.testing.assert_close(loss, expected_loss)
    assert grad is not None
    assert expected_grad is not None
    # The same kernels on the same logits; weights of rows differ in the last bit of fp32.
    assert ((grad - expected_grad).float().norm() / expected_grad.float().norm()).item() < 1e-3


@pytest.mark.parametrize("recorded", [False, True])
def test_a_packed_head_in_parts_is_the_dense_one(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of `head_sft_loss`; recorded as a CUDA graph, too."""
    monkeypatch.setattr(quant, "_HEAD_PART_VALUES", 1000 * 128)
    hidden, weight, targets = inputs(70, 128, 4096)
    hidden.requires_grad_()
    workspace = DequantizationWorkspace()
    head = FrozenHead.from_weight(weight, "nf4", torch.bfloat16, workspace)
    assert len(head.parts) == 5
    dense = torch.cat([part.dequantized() for part in head.parts])

    def step() -> tuple[Tensor, Tensor]:
        (leaf,) = fresh_leaves([hidden])
        loss = head_sft_loss(leaf, head.dense_parts(), targets)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    expected_loss = head_sft_loss(hidden, dense, targets)
    (expected,) = torch.autograd.grad(expected_loss, hidden)
    loss, gradient = step()
    if recorded:
        workspace.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, gradient = step()
        workspace.clear()
        graph.replay()
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-4, atol=0)
    assert (gradient - expected).float().norm() < 0.01 * expected.float().norm()
