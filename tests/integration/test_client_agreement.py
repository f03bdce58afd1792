"""An inference client that nobody here wrote, PyPI's `rwkv`, gives this model's logits.

The client is compared in fp32 on fp32 copies of the models, because it rounds ln0(emb) in the file's
dtype. Its models: a random one of uneven sizes, the bundled demonstration's, and the real trained one of
`RWKV_TEST_DATA` where that is set.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from client_comparison import (
    ROOT,
    largest_relative_difference,
    load,
    logits_at_once,
    logits_step_by_step,
    merge,
    random_tokens,
)
from factories import tiny_adapter, tiny_checkpoint, tiny_state_file, tiny_states
from running import run_script
from tables import some
from torch import Tensor

from src.adapters.plan import AdapterPlan
from src.checkpoint import open_checkpoint, save_model
from src.loading import LoadOptions, build_model

BUNDLED_MODELS = sorted((ROOT / "src" / "demo").glob("*.pth"))
TOLERANCE = 1e-5
"""Largest difference at a position over the position's largest logit; 2e-6 was measured on the 12-layer
trained model over 100 tokens, torch 2.13 on an x86-64 CPU."""


@pytest.fixture(scope="module")
def client() -> Iterator[ModuleType]:
    """The `rwkv` package, which reads its settings from the environment at import."""
    settings = {"RWKV_V7_ON": "0", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield importlib.import_module("rwkv.model")
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def random_model(folder: Path, request: pytest.FixtureRequest) -> Path:
    """Two layers of uneven sizes with every part active."""
    tiny_checkpoint(folder / "source.pth", n_layer=2, n_embd=64, head_size=16, vocab_size=260, seed=3)
    return folder / "source.pth"


def trained_model(folder: Path, request: pytest.FixtureRequest) -> Path:
    """The real one: 12 layers, 16 heads of size 8, vocabulary 256."""
    path: Path = request.getfixturevalue("real_inputs") / "tiny-rwkv6-3m-utf16.pth"
    return path


def bundled(path: Path) -> Callable[[Path, pytest.FixtureRequest], Path]:
    """A model of the bundled demonstration."""
    return lambda folder, request: path


SOURCES = [
    pytest.param(random_model, id="random"),
    pytest.param(trained_model, id="trained", marks=pytest.mark.slow),
    *(pytest.param(bundled(path), id=path.stem, marks=pytest.mark.slow) for path in BUNDLED_MODELS),
]


@pytest.fixture(scope="module", params=SOURCES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 copy of one model."""
    folder = tmp_path_factory.mktemp("client")
    path = folder / "fp32.pth"
    save_model(path, open_checkpoint(request.param(folder, request)), torch.float32)
    return path


@pytest.fixture(scope="module")
def merged(base: Path) -> Path:
    """The same model with a random start state put in by merge_state.py."""
    folder = base.parent
    tiny_state_file(folder / "state.pth", open_checkpoint(base).info.shape, seed=5)
    return merge(base, folder / "state.pth", folder / "merged.pth")


def load_in_client(client: ModuleType, path: Path) -> Any:
    """The model as the client has it; it adds the suffix itself."""
    return client.RWKV(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)


def client_logits_step_by_step(client_model: Any, tokens: list[int]) -> Tensor:
    """[T, V] from one call per token."""
    rows, state = [], None
    for token in tokens:
        logits, state = client_model.forward([token], state)
        rows.append(logits.clone())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def client_logits(client: ModuleType, base: Path, merged: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What the client gives for the same tokens: (at once, step by step) of the base and of the merged model."""
    found = {}
    for name, path in (("base", base), ("merged", merged)):
        client_model = load_in_client(client, path)
        tokens = random_tokens(client_model.w["emb.weight"].shape[0])
        at_once, _ = client_model.forward(tokens, None, full_output=True)
        found[name] = at_once, client_logits_step_by_step(client_model, tokens)
    return found


@pytest.mark.parametrize("name", ["base", "merged"])
def test_logits_are_the_clients(
    client_logits: dict[str, tuple[Tensor, Tensor]], base: Path, merged: Path, name: str
) -> None:
    model = load(merged if name == "merged" else base)
    tokens = random_tokens(model.shape.vocab_size)
    for ours in (logits_at_once(model, tokens), logits_step_by_step(model, tokens)):
        for theirs in client_logits[name]:
            assert largest_relative_difference(ours, theirs) < TOLERANCE


def test_a_merged_state_changes_the_clients_logits(client_logits: dict[str, tuple[Tensor, Tensor]]) -> None:
    (plain, _), (tuned, _) = client_logits["base"], client_logits["merged"]
    assert largest_relative_difference(tuned[:1], plain[:1]) > 1e-2


def test_a_transposed_state_is_another_model(client_logits: dict[str, tuple[Tensor, Tensor]], merged: Path) -> None:
    model = load(merged)
    tokens = random_tokens(model.shape.vocab_size)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.copy_(block.att.time_state.transpose(1, 2).clone())
    assert largest_relative_difference(logits_at_once(model, tokens), client_logits["merged"][0]) > 1e-2


def state_list(matrices: list[Tensor], n_embd: int) -> list[Tensor]:
    """A state as the client's `forward` takes it: [head, key, value] matrices between token shifts of zeros."""
    return [part for matrix in matrices for part in (torch.zeros(n_embd), matrix.float(), torch.zeros(n_embd))]


def read_as_runner(path: Path, n_embd: int, n_layer: int) -> list[Tensor]:
    """RWKV-Runner: as many entries as layers, heads times size is n_embd, the last two axes swapped for RWKV-6."""
    content = torch.load(path, weights_only=True)
    assert len(content) == n_layer
    first = next(iter(content.values()))
    assert first.shape[0] * first.shape[1] == n_embd
    return [content[f"blocks.{layer}.att.time_state"].transpose(1, 2).contiguous() for layer in range(n_layer)]


def read_as_ai00(path: Path, n_embd: int, n_layer: int) -> list[Tensor]:
    """Ai00 and web-rwkv: safetensors, fp16 and nothing else, used as they lie there."""
    content = read_safetensors(path)
    assert {tensor.dtype for tensor in content.values()} == {torch.float16}
    return [content[f"blocks.{layer}.att.time_state"] for layer in range(n_layer)]


def read_as_fla(path: Path, n_embd: int, n_layer: int) -> list[Tensor]:
    """`initial_state` of flash-linear-attention: fp32 [B, H, K, V]."""
    content = read_safetensors(path)
    assert {tensor.dtype for tensor in content.values()} == {torch.float32}
    return [content[f"blocks.{layer}.att.time_state"] for layer in range(n_layer)]


def read_as_rwkvcpp(path: Path, n_embd: int, n_layer: int) -> list[Tensor]:
    """rwkv.cpp: n_layer times two token shifts and the matrices of RWKV-6, [head, key, value], as floats."""
    floats = torch.from_file(str(path), size=path.stat().st_size // 4).view(n_layer, -1)
    assert not floats[:, : 2 * n_embd].any()
    size = (floats.shape[1] - 2 * n_embd) // n_embd
    return list(floats[:, 2 * n_embd :].reshape(n_layer, n_embd // size, size, size))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The format by its description, so that what wrote it does not read it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    dtypes = {"F16": torch.float16, "F32": torch.float32}
    found = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(content[start:end]), dtype=dtypes[entry["dtype"]])
        found[name] = flat.view(entry["shape"])
    return found


READERS = {
    "runner": ("state.pth", read_as_runner),
    "ai00": ("state.state", read_as_ai00),
    "web-rwkv": ("state.st", read_as_ai00),
    "rwkvcpp": ("state.bin", read_as_rwkvcpp),
    "hf": ("state.safetensors", read_as_fla),
}


@pytest.mark.parametrize("target", READERS)
def test_an_exported_state_read_as_its_client_reads_it_gives_the_merged_models_logits(
    client: ModuleType,
    client_logits: dict[str, tuple[Tensor, Tensor]],
    base: Path,
    merged: Path,
    target: str,
    tmp_path: Path,
) -> None:
    """The readers are written here, from the clients' own; the recurrence is the client's, which keeps [key, value]."""
    name, read = READERS[target]
    words = ("export", base.parent / "state.pth", tmp_path / name, "--to", target, "--my_testing", "x060")
    ended = run_script("src/commands/state.py", *words)
    assert ended.code == 0, ended.err
    shape = open_checkpoint(base).info.shape
    state = state_list(read(tmp_path / name, shape.n_embd, shape.n_layer), shape.n_embd)
    tokens = random_tokens(shape.vocab_size)
    logits, _ = load_in_client(client, base).forward(tokens, state, full_output=True)
    assert largest_relative_difference(logits, client_logits["merged"][0]) < TOLERANCE


def test_a_state_exported_for_the_client_itself_is_in_its_model(
    client: ModuleType, client_logits: dict[str, tuple[Tensor, Tensor]], base: Path, tmp_path: Path
) -> None:
    state, output = base.parent / "state.pth", tmp_path / "for-pip.pth"
    ended = run_script("src/commands/state.py", "export", state, output, "--to", "rwkv-pip", "--base", base)
    assert ended.code == 0, ended.err
    client_model = load_in_client(client, output)
    tokens = random_tokens(client_model.w["emb.weight"].shape[0])
    logits, _ = client_model.forward(tokens, None, full_output=True)
    assert torch.equal(logits, client_logits["merged"][0])


@pytest.mark.parametrize("kind", some(["lora", "pissa", "bone", "bat"], "pissa", "bat"))
def test_a_merged_adapter_gives_the_client_the_logits_that_training_has(
    client: ModuleType, kind: str, base: Path, tmp_path: Path
) -> None:
    """The trainer's are those of the adapter beside the base model's matrices, with states and norms trained, too."""
    checkpoint = open_checkpoint(base)
    shape = checkpoint.info.shape
    norms = {key: checkpoint[key] + 0.1 for key in ("ln_out.weight", "blocks.0.ln0.bias", "blocks.1.ln1.weight")}
    further = {**tiny_states(shape, 5, torch.bfloat16), **norms}
    content = tiny_adapter(tmp_path / "trained.pth", shape, kind, further=further)
    flags = {"lora": ("--lora_alpha", "16")}.get(kind, ())
    merged = merge(base, tmp_path / "trained.pth", tmp_path / "merged.pth", "--type", kind, *flags, "--verify", "1")

    first = torch.load(tmp_path / "init_pissa.pth", weights_only=True) if kind == "pissa" else {}
    plan = AdapterPlan(kind, 8, alpha=16.0)
    trained = {*content, *shape.state_shapes()}
    options = LoadOptions(torch.device("cpu"), torch.float32, trained=trained, adapters=plan)
    trainer = build_model({**checkpoint, **first, **content}, shape, options).eval()
    tokens = random_tokens(shape.vocab_size)
    theirs = load_in_client(client, merged).forward(tokens, None, full_output=True)[0]
    assert largest_relative_difference(theirs, logits_at_once(trainer, tokens)) < TOLERANCE
    assert largest_relative_difference(theirs, logits_at_once(load(base), tokens)) > 1e-2
