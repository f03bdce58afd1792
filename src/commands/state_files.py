"""The state tool's commands: what a file is, said; files for clients; sums, distances, and what a state changes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.adapters.files import description_path, said_beside, write_description
from src.adapters.states import blended
from src.adapters.trained import Told, Trained, read_trained
from src.checkpoint import Checkpoint, load_state, open_checkpoint, read_states, save_state
from src.commands.comparison import compared_tokens, logits_on, relative_error
from src.config import TrainConfig
from src.config.model import quant_name
from src.config.state import (
    BlendConfig,
    DiffConfig,
    ExportConfig,
    InspectConfig,
    Share,
    StateFlags,
    VerifyConfig,
)
from src.device import apply_device, resolve_device, without_memory
from src.errors import CheckpointError, ConfigError
from src.export import CLIENTS, Client, refuse_name, write
from src.identity import FileIdentity
from src.inspection import (
    ADAPTER,
    MODEL,
    PARTS,
    REST,
    STATE,
    Content,
    LayerNumbers,
    differences,
    layers_of,
    read_content,
    together,
)
from src.loading import LoadOptions
from src.merge import export_hf, merge
from src.model.shape import state_key
from src.output import several
from src.storage import refuse_existing, refuse_overlap
from src.system import command_here
from src.tuned import Tuned

_DIGEST_SHOWN = 12
_KIND_WORDS = {STATE: "a state", ADAPTER: "an adapter", PARTS: "weights of a model", MODEL: "a model"}


def run(config: StateFlags) -> None:
    """Does what a command's configuration says, and prints what came of it.

    Raises:
        UserError: for everything the user can put right; nothing is written then.
    """
    match config:
        case InspectConfig():
            lines = inspect(config)
        case ExportConfig():
            lines = export(config)
        case BlendConfig():
            lines = blend(config)
        case DiffConfig():
            lines = diff(config)
        case VerifyConfig():
            lines = verify(config)
        case _:
            raise AssertionError(config)
    for line in lines:
        print(line)


def inspect(config: InspectConfig) -> Iterator[str]:
    """What a file holds, a line each."""
    content = read_content(config.file)
    yield f"file       {config.file} ({content.size_bytes:,} bytes)"
    yield f"is         {_described(content)}"
    yield from _provenance(content.said)
    yield "numbers"
    yield f"  {'layer':>5} {'tensors':>8} {'numbers':>14} {'rms':>11} {'largest':>11}"
    for layer, numbers in _with_all(layers_of(content.tensors)):
        name = "all" if layer is None else "rest" if layer == REST else str(layer)
        sizes = f"{numbers.rms:>11.4g} {numbers.largest:>11.4g}"
        yield f"  {name:>5} {numbers.tensors:>8,} {numbers.count:>14,} {sizes}"


def export(config: ExportConfig) -> Iterator[str]:
    """Writes a state for a client, or an adapter for `peft`."""
    client = CLIENTS[config.to]
    beside = description_path(config.file)
    outputs = {"output": config.output}
    if client.suffixes == (".pth",):
        outputs["the JSON beside it"] = os.fspath(description_path(config.output))
    refuse_overlap({"FILE": config.file, "the JSON beside it": _existing(beside), "--base": config.base}, outputs)
    refuse_existing(outputs)
    content = read_content(config.file)
    if content.for_clients:
        raise CheckpointError(f"{config.file} is a client's form already: name the .pth file that training wrote")
    if content.kind in (ADAPTER, PARTS):
        yield from _export_adapter(config, content)
        return
    refuse_name(client, config.output)
    states = read_states(config.file)
    base = open_checkpoint(config.base) if config.base else None
    if base is not None:
        load_state(config.file, base.info.shape)
    architecture = _architecture(config, content, base, client)
    if architecture in client.merged:
        yield from _export_merged(config, client, architecture)
        return
    write(config.output, client, states, architecture, base.info.shape.n_embd if base is not None else 0)
    if content.said and "the JSON beside it" in outputs:
        write_description(description_path(config.output), content.said)
    first = states[state_key(0)]
    order = "value, key" if not client.turns(architecture) else "key, value"
    dtype = str(client.dtype or first.dtype).removeprefix("torch.")
    yield f"exported   {len(states)} layers of state {list(first.shape)} for {client.title}: [head, {order}], {dtype}"
    yield f"written    {config.output} ({os.path.getsize(config.output):,} bytes)"
    yield f"next       {client.use[architecture or 'x060'].format(file=Path(config.output).name)}"


def blend(config: BlendConfig) -> Iterator[str]:
    """Writes the weighted sum of states."""
    shares = config.shares
    own_json = description_path(config.output)
    inputs = {f"state {number}": share.file for number, share in enumerate(shares, start=1)}
    jsons = {f"the JSON of {name}": _existing(description_path(file)) for name, file in inputs.items()}
    outputs = {"OUTPUT": config.output, "the JSON beside it": os.fspath(own_json)}
    refuse_overlap(inputs | jsons, outputs)
    refuse_existing(outputs)
    states = [read_states(share.file) for share in shares]
    for share, state in zip(shares[1:], states[1:], strict=True):
        sizes, wanted = (f"{len(some)} layers of {list(some[state_key(0)].shape)}" for some in (state, states[0]))
        if sizes != wanted:
            raise CheckpointError(
                f"{share.file} has {sizes}, and {shares[0].file} has {wanted}: states of two models have no sum"
            )
    base, architecture = _common_origin(shares)
    sums = blended(states, [share.weight for share in shares])
    dtype = sums[state_key(0)].dtype
    save_state(config.output, sums, dtype)
    blend_of = [{"file": share.file, "weight": share.weight} for share in shares]
    write_description(
        own_json, {"method": "states", "architecture": architecture, "base": base or None, "blend": blend_of}
    )
    total = sum(share.weight for share in shares)
    yield f"blended    {' + '.join(f'{share.weight:g} x {share.file}' for share in shares)}"
    yield f"written    {config.output} ({os.path.getsize(config.output):,} bytes), {str(dtype).removeprefix('torch.')}"
    if abs(total - 1) > 1e-9:
        yield f"note       the weights add up to {total:g}: what the states have in common is scaled by that"


def diff(config: DiffConfig) -> Iterator[str]:
    """How far two files are apart, layer by layer."""
    first, second = read_content(config.first), read_content(config.second)
    if first.for_clients != second.for_clients:
        turned = first if first.for_clients else second
        raise CheckpointError(
            f"{turned.path} is a client's form, [head, key, value], and the other is not: name the .pth files"
        )
    _refuse_other_tensors(first, second)
    yield f"first      {config.first}: {_described(first)}"
    yield f"second     {config.second}: {_described(second)}"
    yield f"  {'layer':>5} {'rms first':>11} {'rms second':>11} {'distance':>9} {'cosine':>8}"
    for layer, numbers in _with_all(differences(first.tensors, second.tensors)):
        name = "all" if layer is None else "rest" if layer == REST else str(layer)
        sizes = f"{numbers.rms:>11.4g} {numbers.other_rms:>11.4g}"
        yield f"  {name:>5} {sizes} {numbers.distance:>9.4g} {numbers.cosine:>8.4f}"
    yield "distance is the norm of the difference over the first's norm"


def verify(config: VerifyConfig) -> Iterator[str]:
    """Whether a file fits a model, and what it changes there."""
    base = open_checkpoint(config.base)
    shape = base.info.shape
    tokens = compared_tokens(config.verify_text, shape)
    trained = read_trained(config.file, shape, Told.by(config))
    yield f"fits       {config.base}: {_held(trained)}"
    yield from _same_base(config, trained)
    if trained.beside:
        yield f"note       it was trained beside the states of {trained.beside}, which are not in it"
    chosen = resolve_device(config.accelerator, config.precision)
    apply_device(chosen)
    quant = None if config.quant == "none" else config.quant
    with without_memory(lambda: "no memory left for the model: use --quant nf4, or --accelerator cpu"):
        tuned = Tuned(base, trained, LoadOptions(chosen.device, chosen.compute_dtype, quant))
        found = logits_on(tuned.model, tokens)
        tuned.use(tuned=False)
        plain = logits_on(tuned.model, tokens)
    what = f"{several(tokens.numel(), 'token')} ({config.verify_text or 'random ones'})"
    yield f"compared   on {what}, {chosen.describe()}, {quant_name(quant or 'unpacked')} weights"
    if trained.quant not in (None, "none" if quant is None else quant_name(quant)):
        on = "unpacked" if trained.quant == "none" else trained.quant
        yield f"note       it was trained on {on} weights: --quant {trained.quant} compares on such"
    yield from _changes(found, plain, tokens, is_text=bool(config.verify_text))


def _changes(found: Tensor, plain: Tensor, tokens: Tensor, *, is_text: bool) -> Iterator[str]:
    """How logits [T, V] with what was trained differ from those without."""
    with_it, without = found.double().log_softmax(-1), plain.double().log_softmax(-1)
    divergence = (with_it.exp() * (with_it - without)).sum(-1)
    other = (found.argmax(-1) != plain.argmax(-1)).double().mean().item()
    yield f"logits     {relative_error(found, plain):.2%} from those without it (rms)"
    yield f"           another token is the most probable one at {other:.1%} of positions"
    yield f"divergence {divergence.mean().item():.4f} nats a token (KL), {divergence[0].item():.4f} at the first"
    if is_text and len(tokens) > 1:
        of_targets = [logp[:-1].gather(1, tokens[1:, None]).mean().item() for logp in (without, with_it)]
        yield f"loss       {-of_targets[0]:.4f} without it, {-of_targets[1]:.4f} with it, nats a token of the text"
    if torch.equal(found, plain):
        yield "note       it changes nothing at all: its numbers are zero, or have no effect"


def _export_adapter(config: ExportConfig, content: Content) -> Iterator[str]:
    """Writes what is no state, which only `peft` takes apart from a model."""
    if config.to != "hf":
        raise CheckpointError(
            f"{config.file} is {_KIND_WORDS[content.kind]}, and {CLIENTS[config.to].title} takes models: merge it "
            f"({command_here('merge_state.py', config.base or 'BASE.pth', config.file, 'merged.pth')})"
        )
    if not config.base:
        raise ConfigError("--base is missing: an adapter is written for the model it was trained on")
    exported = export_hf(config.base, config.file, config.output, Told.by(config))
    for subject, said in exported.lines(config.output):
        yield f"{subject:<10} {said}"


def _export_merged(config: ExportConfig, client: Client, architecture: str) -> Iterator[str]:
    """Writes a model that contains the state."""
    if not config.base:
        raise ConfigError(
            f"--base is missing: {client.title} takes an {architecture} state inside of the model it was trained on"
        )
    report = merge(config.base, config.file, config.output)
    yield f"exported   the model with {report.shape.n_layer} layers of state in {report.state_dtype}"
    yield f"written    {config.output} ({report.size_bytes:,} bytes)"
    yield f"next       {client.use[architecture].format(file=Path(config.output).name)}"


def _architecture(config: ExportConfig, content: Content, base: Checkpoint | None, client: Client) -> str:
    """Of the model that a state belongs to; "" where nothing says it and the client does not ask.

    Raises:
        ConfigError: two sources contradict each other, or there is none.
    """
    said = {"--my_testing": config.my_testing}
    model = base or content.model
    if model is not None:
        said[os.fspath(model.source)] = model.info.shape.architecture
    flags = content.said.get("flags")
    noted = content.said.get("architecture") or (flags.get("my_testing") if isinstance(flags, dict) else "")
    said[description_path(config.file).name] = noted or ""
    known = {source: name for source, name in said.items() if name}
    for source, name in known.items():
        first = next(iter(known))
        if name != known[first]:
            way_out = "leave --my_testing out" if config.my_testing else "name a state and the model it was trained on"
            raise ConfigError(f"{first} says {known[first]}, and {source} says {name}: {way_out}")
    if not known and client.asks_architecture:
        raise ConfigError(
            f"{config.file} does not say its model's architecture, on which the file for {client.title} depends: give "
            "--my_testing x060 (RWKV-6), --my_testing x070 (RWKV-7), or the model with --base"
        )
    return next(iter(known.values()), "")


def _described(content: Content) -> str:
    """What a file is, in a phrase."""
    first = next(iter(content.tensors.values()))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in content.tensors.values()})
    dtype = " and ".join(dtypes)
    states = [key for key in content.tensors if key.endswith(".att.time_state")]
    if content.kind == STATE:
        order = "key, value" if content.for_clients else "value, key"
        form = ", as Ai00 and web-rwkv take it" if content.for_clients else ""
        return f"a state: {len(content.tensors)} layers of {list(first.shape)} (head, {order}), {dtype}{form}"
    if content.model is not None:
        shape = content.model.info.shape
        heads = "head" if shape.n_head == 1 else "heads"
        merged = ", with a state in it" if content.model.info.has_state else ""
        return (
            f"a model: {shape.family}, {shape.parameter_count:,} parameters, {shape.n_layer} layers, n_embd "
            f"{shape.n_embd}, {shape.n_head} {heads} of {shape.head_size}, vocabulary {shape.vocab_size}, "
            f"{dtype}{merged}"
        )
    adapted = [key for key in content.tensors if key.endswith((".lora_A", ".lora_B", ".bone"))]
    others = len(content.tensors) - len(adapted) - len(states)
    further = [several(others, "further weight")] if others else []
    further += [f"the states of {len(states)} layers"] if states else []
    if not adapted:
        return f"weights of a model: {' and '.join(further)}, {dtype}"
    matrices = {key.rpartition(".")[0] for key in adapted}
    name = adapted[0].rpartition(".")[2]
    method = content.said.get("method") or ("Bone or Bat" if name == "bone" else "LoRA or PiSSA")
    known = [f"{word} {content.said[word]}" for word in ("r", "alpha", "scale") if word in content.said]
    parts = [f"{method} ({', '.join(known)})" if known else method]
    parts[0] += f" on {len(matrices)} matrices, {name} {list(content.tensors[adapted[0]].shape)} first"
    return f"an adapter: {', '.join([*parts, *further])}, {dtype}"


def _provenance(said: Mapping[str, Any]) -> Iterator[str]:
    """What the JSON beside a file says of how it was made."""
    if not said:
        yield "made       by nothing that is known: there is no JSON beside it"
        return
    base = said.get("base") if isinstance(said.get("base"), dict) else {}
    assert isinstance(base, dict)
    digest = f", sha256 {str(base['sha256'])[:_DIGEST_SHOWN]}..." if "sha256" in base else ""
    size = f" ({base['size_bytes']:,} bytes{digest})" if isinstance(base.get("size_bytes"), int) else ""
    quant = said.get("quant")
    weights = f", {quant_name(quant)} weights" if quant not in (None, "none") else ""
    method, name = said.get("method", "by an unknown method"), base.get("file", "an unknown model")
    yield f"trained    {method} on {name}{size}{weights}"
    if isinstance(said.get("blend"), list):
        parts = (f"{part.get('weight')} x {part.get('file')}" for part in said["blend"] if isinstance(part, dict))
        yield f"blended    {' + '.join(parts)}"
    flags = said.get("flags")
    if isinstance(flags, dict):
        default = TrainConfig()
        changed = {name: value for name, value in flags.items() if value != getattr(default, name, None)}
        yield f"flags      {' '.join(f'--{name} {shlex.quote(str(value))}' for name, value in changed.items())}"


def _held(trained: Trained) -> str:
    """What was put into a model."""
    parts = [trained.describe()] if trained.adapters else []
    parts += [f"{len(trained.weights)} further weights"] if trained.weights else []
    parts += [f"states of {len(trained.states)} layers"] if trained.states else []
    return ", ".join(parts)


def _same_base(config: VerifyConfig, trained: Trained) -> Iterator[str]:
    """Whether the model is the one that the file was trained on."""
    if "size_bytes" not in trained.base:
        yield "           no JSON beside it says which model it was trained on"
        return
    identity = FileIdentity(config.base, at_once=False)
    name = trained.base.get("file", "another file")
    if identity.size_bytes != trained.base["size_bytes"]:
        yield f"warning    it was trained on {name} of {trained.base['size_bytes']:,} bytes, which is another model"
    elif "sha256" in trained.base and identity.sha256 != trained.base["sha256"]:
        yield f"warning    it was trained on {name}, which had as many bytes and others: it is another model"
    else:
        yield f"           it was trained on this model ({name}: size and SHA-256 are the same)"


def _common_origin(shares: Sequence[Share]) -> tuple[dict[str, Any], str]:
    """Base model and architecture that the JSON files beside states say, as far as they do.

    Raises:
        CheckpointError: two of them were trained on different models.
    """
    base: dict[str, Any] = {}
    architecture = ""
    for share in shares:
        said = said_beside(share.file) or {}
        own = said.get("base") if isinstance(said.get("base"), dict) else {}
        assert isinstance(own, dict)
        if base and own and base.get("sha256") != own.get("sha256"):
            raise CheckpointError(
                f"{share.file} was trained on {own.get('file')} and {shares[0].file} on {base.get('file')}, another "
                "model: states of two models have no sum"
            )
        base = base or own
        own_architecture = str(said.get("architecture") or "")
        if architecture and own_architecture and architecture != own_architecture:
            raise CheckpointError(
                f"{share.file} was trained on an {own_architecture} model and one before it on an {architecture} "
                "model: states of two models have no sum"
            )
        architecture = architecture or own_architecture
    return base, architecture


def _refuse_other_tensors(first: Content, second: Content) -> None:
    """Refuses to compare files that hold different tensors.

    Raises:
        CheckpointError: naming the first that has no counterpart.
    """
    if first.kind != second.kind:
        raise CheckpointError(
            f"{first.path} is {_KIND_WORDS[first.kind]} and {second.path} is {_KIND_WORDS[second.kind]}: name files of "
            "one kind"
        )
    for key in [*first.tensors, *second.tensors]:
        lacking = next((some.path for some in (first, second) if key not in some.tensors), None)
        if lacking is not None:
            raise CheckpointError(f"{lacking} has no {key}, which the other file has: name files of one training")
        one, other = (list(some.tensors[key].shape) for some in (first, second))
        if one != other:
            raise CheckpointError(
                f"{key} has shape {one} in {first.path} and {other} in {second.path}: name files for one model"
            )


def _with_all(layers: dict[int, LayerNumbers]) -> Iterator[tuple[int | None, LayerNumbers]]:
    """The layers, and at last all of them as None."""
    yield from layers.items()
    yield None, together(layers)


def _existing(path: Path) -> str:
    return os.fspath(path) if os.path.exists(path) else ""
