"""Chunked log-probabilities against log_softmax over all logits, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.losses import sft_loss
from src.ops.token_logps import head_sft_loss, token_logps, token_logps_gradient
from src.training.module import FP16_LOSS_SCALE

ROWS, CHANNELS, VOCABULARY = 13, 8, 21


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, CHANNELS, dtype=dtype, generator=generator)
    weight = torch.randn(VOCABULARY, CHANNELS, dtype=dtype, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[[2, 7]] = -100
    return hidden, weight, targets


def dense_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    counted = targets >= 0
    logp = torch.log_softmax(logits, -1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(counted, logp, 0.0), torch.where(counted, logits.max(-1).values, 0.0)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100, None])
def test_values_and_both_gradients(chunk_tokens: int | None) -> None:
    hidden, weight, targets = inputs()
    by_logp, by_max = torch.randn(2, ROWS, dtype=torch.float64)
    gradients = []
    for compute in (lambda h, w: token_logps(h, w, targets, chunk_tokens=chunk_tokens),
                    lambda h, w: dense_logps(h, w, targets)):  # fmt: skip
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, max_logit = compute(h, w)
        ((logp * by_logp).sum() + (max_logit * by_max).sum()).backward()
        gradients.append((logp.detach(), max_logit.detach(), h.grad, w.grad))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_known_gradients_is_that_of_the_backward(dtype: torch.dtype, chunk_tokens: int | None) -> None:
    hidden, weight, targets = inputs(dtype)
    by = torch.randn(2, ROWS, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scores = token_logps(hidden.requires_grad_(), weight, targets, chunk_tokens=chunk_tokens)
    torch.autograd.backward(scores, list(by))
    found = token_logps_gradient(hidden.detach(), weight, targets, *by, chunk_tokens=chunk_tokens)
    assert found.dtype == dtype
    assert torch.equal(found, hidden.grad)


def test_gradcheck() -> None:
    hidden, weight, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logps(h, w, targets, chunk_tokens=5),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_uncounted_rows_are_zero_without_gradient() -> None:
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    logp, max_logit = token_logps(hidden, weight, targets, chunk_tokens=4)
    (logp.sum() + max_logit.square().sum()).backward()
    assert hidden.grad is not None
    for row in (2, 7):
        assert logp[row] == 0
        assert max_logit[row] == 0
        assert not hidden.grad[row].any()
    assert hidden.grad[[0, 1, 3, 4, 5, 6]].abs().sum(1).min() > 0


def test_the_largest_logit_may_be_the_target() -> None:
    hidden, weight, _ = inputs()
    targets = (hidden @ weight.t()).argmax(-1)
    hidden.requires_grad_()
    logp, max_logit = token_logps(hidden, weight, targets)
    (logp.sum() + max_logit.sum()).backward()
    again = hidden.detach().clone().requires_grad_()
    expected_logp, expected_max = dense_logps(again, weight, targets)
    (expected_logp.sum() + expected_max.sum()).backward()
    torch.testing.assert_close(hidden.grad, again.grad)


def test_a_frozen_head_gets_no_gradient_and_one_in_parts_is_not_kept() -> None:
    hidden, weight, targets = inputs(torch.float32)
    calls: list[int] = []

    def part_from(first: int) -> Callable[[], Tensor]:
        def part() -> Tensor:
            calls.append(first)
            return weight[first : first + 5].clone()

        return part

    results = []
    for head_weight in (weight, [part_from(first) for first in range(0, VOCABULARY, 5)]):
        h = hidden.clone().requires_grad_()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):  # noqa: B023
            logp, max_logit = token_logps(h, head_weight, targets, chunk_tokens=4)
        (logp.sum() + 0.3 * max_logit.square().sum()).backward()
        results.append((logp, max_logit, h.grad))
        shapes = {tuple(t.shape) for t in saved}
        allowed = {(ROWS, CHANNELS), (ROWS,)}
        assert shapes <= (allowed | {(VOCABULARY, CHANNELS)} if head_weight is weight else allowed)
    assert weight.grad is None
    assert calls == [*range(0, VOCABULARY, 5)] * 2
    for whole, by_parts in zip(*results, strict=True):
        torch.testing.assert_close(by_parts, whole)


def test_parts_agree_on_the_first_of_equal_largest_logits() -> None:
    # Each row of the head gives the same logit, 1, by a channel of its own: the gradient shows which was named.
    weight = torch.eye(6, dtype=torch.float64)
    hidden = torch.ones(2, 6, dtype=torch.float64, requires_grad=True)
    for head_weight in (weight, [lambda: weight[:2], lambda: weight[2:4], lambda: weight[4:]]):
        _, max_logit = token_logps(hidden, head_weight, torch.tensor([5, 0]))
        (gradient,) = torch.autograd.grad(max_logit.sum(), hidden)
        assert torch.equal(gradient, weight[:1].expand(2, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_sum_in_the_dtype_of_whole_heads(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    parts = [lambda: weight[:3], lambda: weight[3:]]
    for whole, by_parts in zip(token_logps(hidden, weight, targets), token_logps(hidden, parts, targets), strict=True):
        assert by_parts.dtype == whole.dtype
        torch.testing.assert_close(by_parts, whole)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    logp, max_logit = token_logps(hidden, weight, targets, chunk_tokens=5)
    assert logp.dtype == max_logit.dtype == torch.float32
    logits = (hidden @ weight.t()).float()
    expected = torch.log_softmax(logits, -1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logp, torch.where(targets >= 0, expected, 0.0))


def test_no_rows() -> None:
    _, weight, _ = inputs()
    hidden = torch.zeros(0, CHANNELS, dtype=torch.float64, requires_grad=True)
    logp, max_logit = token_logps(hidden, weight, torch.zeros(0, dtype=torch.int64))
    (logp.sum() + max_logit.sum()).backward()
    assert logp.shape == max_logit.shape == (0,)


@pytest.mark.parametrize("head", ["tensor", "parts", "trainable"])
@pytest.mark.parametrize("chunk_tokens", [4, 13, None])
def test_sft_loss_with_its_head_is_the_loss_of_token_logps(chunk_tokens: int | None, head: str) -> None:
    hidden, weight, targets = inputs()
    results = []
    for fused in (True, False):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(head == "trainable")
        if fused:
            parts = [lambda: weight[:7], lambda: weight[7:]]
            loss = head_sft_loss(h, parts if head == "parts" else w, targets, chunk_tokens=chunk_tokens)
        else:
            logp, max_logit = token_logps(h, w, targets)
            loss = sft_loss(logp, max_logit, targets >= 0)
        (3.0 * loss).backward()
        results.append((loss.detach(), h.grad, *([w.grad] if head == "trainable" else [])))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)
    assert results[0][1] is not None
    assert not results[0][1][[2, 7]].any()


def test_sft_loss_without_gradient_or_without_counted_rows() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = head_sft_loss(hidden, weight, targets)
    logp, _ = token_logps(hidden, weight, targets)
    torch.testing.assert_close(loss, -logp.sum() / (targets >= 0).sum())
    hidden.requires_grad_()
    nothing = head_sft_loss(hidden, weight, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def rounded_gradients(dtype: torch.dtype, rows: int, factor: float) -> tuple[Tensor, Tensor]:
    """The gradient of hidden in `dtype` and in fp64 from the same rounded inputs, both of factor * loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(4096, 32, generator=generator)).to(dtype)
    targets = torch.randint(0, 4096, (rows,), generator=generator)
    found = []
    for wanted in (dtype, torch.float64):
        h = hidden.detach().to(wanted, copy=True).requires_grad_()
        (head_sft_loss(h, weight.to(wanted), targets) * factor).backward()
        assert h.grad is not None
        found.append(h.grad.double())
    return found[0], found[1]


@pytest.mark.parametrize("rows", [1, 100, 4096])
def test_fp16_gradients_do_not_underflow_before_the_loss_scale_reaches_them(rows: int) -> None:
    ours, exact = rounded_gradients(torch.float16, rows, FP16_LOSS_SCALE)
    # Measured: 0.0005 at most, torch 2.13 on a CPU; 0.0040 at 4096 rows where the mean's gradient is kept in fp16.
    assert (ours - exact).norm() < 0.001 * exact.norm()


@pytest.mark.parametrize("factor", [1 / 3, 1 / 5, 0.9])
def test_the_factor_of_a_bf16_loss_is_not_rounded(factor: float) -> None:
    whole, _ = rounded_gradients(torch.bfloat16, 50, 1.0)
    scaled, _ = rounded_gradients(torch.bfloat16, 50, factor)
    assert torch.equal(scaled, (whole * torch.tensor(factor)).bfloat16().double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sft_loss_of_no_rows(dtype: torch.dtype) -> None:
    hidden = torch.zeros(0, CHANNELS, dtype=dtype, requires_grad=True)
    loss = head_sft_loss(hidden, torch.ones(VOCABULARY, CHANNELS, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
