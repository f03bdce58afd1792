"""RWKV-7: PyPI's client `rwkv` gives this model's logits, at once and step by step, from a state in its list, too.

The client is compared in fp32 on fp32 copies of the models: a random one, the real text model and the reversal models
of `RWKV_TEST_DATA`, which are trained and whose memory does hard work.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from client_comparison import (
    largest_relative_difference,
    load,
    logits_at_once,
    logits_step_by_step,
    merge,
    random_tokens,
)
from factories import tiny_adapter, tiny_checkpoint, tiny_states
from torch import Tensor
from wkv7_inputs import layer_inputs

from src.adapters.plan import AdapterPlan
from src.checkpoint import open_checkpoint, save_model, save_state
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel

RANDOM = "random"
TOLERANCES = {RANDOM: 1e-5, "834k-bytes": 1e-5, "reverse-n16": 4e-5, "reverse-n64": 4e-5}
"""Largest difference over the largest logit. Measured, at once or step by step: 8e-7 (random), 3e-7 (text), 2e-5
(reversal at work, where fp32 itself is 1e-5 from fp64: logits reach 40), torch 2.13 on an x86-64 CPU."""
SEPARATOR, END = 10, 11


@pytest.fixture(scope="module")
def client() -> Iterator[ModuleType]:
    """The `rwkv` package's model as it is with RWKV_V7_ON=1, which it reads at import, apart from that of RWKV-6."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        spec = importlib.util.find_spec("rwkv.model")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(
    scope="module",
    params=[RANDOM, "834k-bytes", "reverse-n16", pytest.param("reverse-n64", marks=pytest.mark.slow)],
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 copy of one model."""
    path: Path = tmp_path_factory.mktemp("client") / f"{request.param}.pth"
    if request.param == RANDOM:
        sizes = {"n_layer": 3, "n_embd": 64, "head_size": 16, "vocab_size": 260, "seed": 3}
        tiny_checkpoint(path, **sizes, holds_idle=True, architecture="x070")
    else:
        source = request.getfixturevalue("real_inputs") / f"tiny-rwkv7-{request.param}.pth"
        save_model(path, open_checkpoint(source), torch.float32)
    return path


def tokens_for(base: Path) -> list[int]:
    """Random tokens, or for a reversal model what it was trained on."""
    if "reverse" not in base.stem:
        return random_tokens(open_checkpoint(base).info.shape.vocab_size)
    digits = np.random.default_rng(5).integers(0, 10, size=40).tolist()
    return [*digits, SEPARATOR, *digits[::-1], END]


def client_of(module: ModuleType, path: Path) -> Any:
    return module.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")


def client_state(client_model: Any, states: dict[str, Tensor] | None) -> list[Tensor]:
    """The client's list for an empty memory, with start states in their places."""
    state: list[Tensor] = client_model.generate_zero_state()
    for layer, start in enumerate((states or {}).values()):
        state[3 * layer + 1] = start.float().clone()
    return state


def client_logits(client_model: Any, tokens: Sequence[int], states: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """[T, V] at once and step by step."""
    at_once, _ = client_model.forward(list(tokens), client_state(client_model, states), full_output=True)
    rows, state = [], client_state(client_model, states)
    for token in tokens:
        logits, state = client_model.forward([token], state)
        rows.append(logits.clone())
    return at_once, torch.stack(rows)


def with_states(path: Path, states: dict[str, Tensor]) -> LanguageModel:
    checkpoint = open_checkpoint(path)
    options = LoadOptions(torch.device("cpu"), torch.float32)
    return build_model({**checkpoint, **states}, checkpoint.info.shape, options).eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("tuned", [False, True], ids=["zero state", "tuned state"])
def test_logits_are_the_clients(client: ModuleType, base: Path, tuned: bool) -> None:
    shape = open_checkpoint(base).info.shape
    states = tiny_states(shape, seed=5) if tuned else {}
    model, client_model = with_states(base, states), client_of(client, base)
    tokens = tokens_for(base)
    theirs = client_logits(client_model, tokens, states)
    for ours in (logits_at_once(model, tokens), logits_step_by_step(model, tokens)):
        for logits in theirs:
            assert apart(ours, logits) < TOLERANCES[base.stem]
    if tuned:
        transposed = {key: state.transpose(1, 2) for key, state in states.items()}
        assert apart(logits_at_once(with_states(base, transposed), tokens), theirs[0]) > 1e-2


def test_a_state_inside_a_model_is_used_here_and_ignored_there(client: ModuleType, base: Path, tmp_path: Path) -> None:
    """What merge_state.py says of the client."""
    states = tiny_states(open_checkpoint(base).info.shape, seed=5, dtype=torch.bfloat16)
    save_state(tmp_path / "state.pth", states)
    merged = merge(base, tmp_path / "state.pth", tmp_path / "merged.pth")
    tokens = tokens_for(base)
    client_model = client_of(client, merged)
    assert torch.equal(
        client_logits(client_model, tokens, None)[0], client_logits(client_of(client, base), tokens, None)[0]
    )
    used = client_logits(client_model, tokens, states)[0]
    assert apart(logits_at_once(load(merged), tokens), used) < TOLERANCES[base.stem]


@pytest.mark.parametrize("kind", ["lora", "pissa", "bone", "bat"])
def test_a_merged_adapter_gives_the_client_the_logits_that_training_has(
    client: ModuleType, kind: str, tmp_path: Path
) -> None:
    base = tmp_path / "base.pth"
    shape = tiny_checkpoint(base, n_layer=2, n_embd=64, head_size=16, vocab_size=260, seed=3, architecture="x070")
    checkpoint = open_checkpoint(base)
    parts = {key: checkpoint[key] + 0.1 for key in ("ln_out.weight", "blocks.1.att.w0", "blocks.1.att.v2")}
    content = tiny_adapter(tmp_path / "trained.pth", shape, kind, further=parts)
    flags = {"lora": ("--lora_alpha", "16")}.get(kind, ())
    merged = merge(base, tmp_path / "trained.pth", tmp_path / "merged.pth", "--type", kind, *flags, "--verify", "1")

    first = torch.load(tmp_path / "init_pissa.pth", weights_only=True) if kind == "pissa" else {}
    options = LoadOptions(
        torch.device("cpu"), torch.float32, trained=set(content), adapters=AdapterPlan(kind, 8, alpha=16.0)
    )
    trainer = build_model({**checkpoint, **first, **content}, shape, options).eval()
    tokens = random_tokens(shape.vocab_size)
    theirs = client_logits(client_of(client, merged), tokens, None)[0]
    assert largest_relative_difference(theirs, logits_at_once(trainer, tokens)) < TOLERANCES[RANDOM]
    assert largest_relative_difference(theirs, logits_at_once(load(base), tokens)) > 1e-2


@pytest.mark.parametrize("size", [16, 64])
def test_logits_of_the_reversal_models_are_those_of_a_float64_loop(size: int, real_inputs: Path) -> None:
    """In float64 to the last digits.

    float32 cannot be at 1e-6 here, whoever computes: an embedding moved by half of its last bit moves logits by
    1.4e-6 of the largest, and the recurrence alone, as a plain loop in float32 (everything else in float64), by
    5.1e-6. Ours in float32 is 5.6e-6 (N 16) and 7.9e-6 (N 64) off, the client up to 1.5e-5.
    """
    checkpoint = open_checkpoint(real_inputs / f"tiny-rwkv7-reverse-n{size}.pth")
    digits = np.random.default_rng(5).integers(0, 10, size=40).tolist()
    tokens = [*digits, SEPARATOR, *digits[::-1], END]
    _, exact = layer_inputs(dict(checkpoint), tokens)
    embedding = checkpoint["emb.weight"].double()
    moved = embedding * (1 + 2**-24 * (2 * torch.rand_like(embedding) - 1))
    assert apart(layer_inputs({**checkpoint, "emb.weight": moved}, tokens)[1], exact) > 5e-7
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1.5e-5)):
        options = LoadOptions(torch.device("cpu"), dtype)
        model = build_model(checkpoint, checkpoint.info.shape, options).to(dtype).eval()
        assert apart(logits_at_once(model, tokens), exact) < limit


@pytest.mark.parametrize("name", ["reverse-n16", pytest.param("reverse-n64", marks=pytest.mark.slow)])
def test_the_reversal_models_reverse(name: str, real_inputs: Path) -> None:
    """All digits of numbers of 1 to 60 digits, token after token, each from the model's own answer."""
    model = load(real_inputs / f"tiny-rwkv7-{name}.pth")
    generator = np.random.default_rng(7)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 41, 50, 60, 60, 30]
    numbers = [generator.integers(0, 10, size=length).tolist() for length in lengths]
    right = 0
    for digits in numbers:
        with torch.no_grad():
            hidden, state = model(torch.tensor([[*digits, SEPARATOR]]), return_state=True)
            answer = []
            for _ in digits:
                answer.append(int(model.logits(hidden[0, -1]).argmax()))
                hidden, state = model(torch.tensor([[answer[-1]]]), state, return_state=True)
        right += sum(one == other for one, other in zip(answer, digits[::-1], strict=True))
        assert int(model.logits(hidden[0, -1]).argmax()) == END
    assert right == sum(lengths) == 328
