"""Model, state and pair files: the only caller of `torch.load` and `torch.save`.

A file is opened by memory map and with `weights_only`, never in any other way: reading it costs
address space, not memory, and runs no code that the file brings along. What it holds is recognised
before it is used; a file of another kind is refused by its name. Every write goes to a temporary
file beside the target, is flushed to the disk and then takes the target's place in one step.
"""

import errno
import math
import mmap
import os
import re
import secrets
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from src.data.preferences import PreferencePair, pairs_from_tuples
from src.errors import CheckpointError
from src.model.parameters import ModelShape, key_problems, state_key, state_shapes

PathLike: TypeAlias = str | os.PathLike[str]

_PREFIXES = ("_forward_module.", "model.")
"""What DeepSpeed engines and wrapping modules put before every key."""

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_STATE_SUFFIX = ".att.time_state"

_PAIR_FILE = "pair file"

_REFUSED_GLOBAL = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
"""How torch names a Python object that it does not load with `weights_only`."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model file is, without its weights.

    Attributes:
        shape: all sizes, read from the tensors.
        dtype: of `emb.weight`, as "bfloat16", "float16", "float32" or "float64". A merged state may differ.
        prefix: what stood before the key names in the file and was stripped; mostly "".
        has_state: whether every layer has a `time_state` (a merged model).
    """

    shape: ModelShape
    dtype: str
    prefix: str
    has_state: bool


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model file by standard key, backed by the file's pages.

    A tensor's bytes are read from the file when it is used, and the system may drop them again:
    host memory does not grow with the file. Writing into a tensor changes neither the file nor
    another reader.
    """

    def __init__(self, info: CheckpointInfo, tensors: dict[str, Tensor]) -> None:
        self.info = info
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class MergeReport:
    """What `merge_state` did.

    Attributes:
        shape: sizes of the base model.
        base_dtype: dtype of the base model's weights, as in CheckpointInfo.
        state_dtype: dtype of the merged state.
        replaced_state: whether the base already had a state, now replaced.
        size_bytes: size of the written file.
    """

    shape: ModelShape
    base_dtype: str
    state_dtype: str
    replaced_state: bool
    size_bytes: int


def inspect_checkpoint(path: PathLike) -> CheckpointInfo:
    """Sizes, dtype and kind of a model file, with the checks of `open_checkpoint`; reads no weights."""
    return open_checkpoint(path).info


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Opens a model file by memory map and checks that it is a complete RWKV-6 (x060) model.

    Key prefixes `_forward_module.` and `model.`, and a `{"state_dict": ...}` around the keys, are
    taken off.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or architecture, or a key is
            missing, superfluous, misshapen or not a floating-point tensor.
    """
    content, prefix = _read(path, "model file")
    states_only = bool(content) and all(key.endswith(_STATE_SUFFIX) for key in content)
    if states_only:
        raise CheckpointError(
            f"{path} holds only the time_state of {len(content)} layers; it is a state file, and the base "
            "model it was trained on is needed here"
        )
    kind = _other_kind(content)
    if kind:
        raise CheckpointError(f"{path} {kind}")
    tensors = _float_tensors(path, content)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        shape = ModelShape.from_shapes(shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no complete RWKV-6 (x060) model: {error}") from None
    problems = key_problems(shapes, shape)
    if problems:
        raise CheckpointError(
            f"{path} is no complete RWKV-6 (x060) model, judged by the sizes of its embedding and first "
            f"layer: {'; '.join(problems)}"
        )
    info = CheckpointInfo(
        shape=shape,
        dtype=_dtype_name(tensors["emb.weight"].dtype),
        prefix=prefix,
        has_state=state_key(0) in tensors,
    )
    return Checkpoint(info, tensors)


def check_sizes(shape: ModelShape, expected: Mapping[str, int | None]) -> list[str]:
    """Compares sizes given by flags with those of a checkpoint.

    Args:
        expected: flag name without dashes (`n_layer n_embd dim_att dim_ffn vocab_size head_size_a
            double_extra_dim`) -> value; 0 and None mean that the flag was not given.

    Returns:
        One sentence for each mismatch, naming the flag and both numbers.
    """
    actual = {
        "n_layer": shape.n_layer,
        "n_embd": shape.n_embd,
        "dim_att": shape.dim_att,
        "dim_ffn": shape.dim_ffn,
        "vocab_size": shape.vocab_size,
        "head_size_a": shape.head_size,
    }
    sentences = []
    for flag, value in expected.items():
        if not value:
            continue
        if flag == "double_extra_dim":
            widths = (shape.mix_lora_width, shape.decay_lora_width)
            if widths != (64, 128):
                sentences.append(
                    f"--double_extra_dim {value} means LoRA widths 64 and 128, but the checkpoint has "
                    f"{widths[0]} and {widths[1]}; leave the flag out"
                )
        elif value != actual[flag]:
            sentences.append(
                f"--{flag} {value} contradicts the checkpoint, which has {actual[flag]}; leave the flag out "
                f"or give {actual[flag]}"
            )
    return sentences


def load_state(path: PathLike, shape: ModelShape) -> dict[str, Tensor]:
    """Reads the initial state of every layer from a state file or a merged model.

    Returns:
        `blocks.{i}.att.time_state` -> [H, N, N] (head, value, key), in layer order, in the file's
        dtype and in memory of their own.

    Raises:
        CheckpointError: The file cannot be read, or its states do not fit a model of this shape, or
            a value is not finite.
    """
    content, _ = _read(path, "state file")
    states = {key: value for key, value in content.items() if key.endswith(_STATE_SUFFIX)}
    if not states:
        raise CheckpointError(
            f"{path} holds no blocks.*.att.time_state; a state file written by this program, or a merged "
            "model, is needed here"
        )
    others = [key for key in content if key not in states]
    if others and "emb.weight" not in content:
        raise CheckpointError(
            f"{path} holds {others[0]}{_and_more(others)} beside the time_state of {len(states)} layers; "
            "a state file holds nothing else"
        )
    tensors = _float_tensors(path, states)
    expected = state_shapes(shape)
    if tensors.keys() != expected.keys():
        missing = [key for key in expected if key not in tensors]
        superfluous = [key for key in tensors if key not in expected]
        problems = [f"lacks {missing[0]}{_and_more(missing)}"] if missing else []
        problems += [f"also has {superfluous[0]}{_and_more(superfluous)}"] if superfluous else []
        raise CheckpointError(
            f"{path} holds the time_state of {len(tensors)} layers, but the model has {shape.n_layer} "
            f"layers: it {' and '.join(problems)}; a state only fits the model it was trained on"
        )
    for key, wanted in expected.items():
        if tuple(tensors[key].shape) != wanted:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, but the model needs {list(wanted)} "
                "(heads, head size, head size); a state only fits the model it was trained on"
            )
    _refuse_non_finite(path, tensors)
    return {key: tensors[key].detach().clone(memory_format=torch.contiguous_format) for key in expected}


def save_state(path: PathLike, states: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a state file: the L keys `blocks.{i}.att.time_state` and nothing else, atomically.

    Args:
        states: key -> [H, N, N] (head, value, key) of every layer, on any device, in any float dtype.
        dtype: dtype in the file; inference clients expect 16 bits.

    Raises:
        CheckpointError: A value is not finite in `dtype`, or the file cannot be written. An existing
            file is then unchanged.
    """
    keys = [state_key(layer) for layer in range(len(states))]
    assert keys, "no states to save"
    assert set(keys) == set(states), f"not the states of {len(states)} layers: {sorted(states)}"
    tensors = {key: _own_copy(states[key], dtype) for key in keys}
    heads, size, _ = tensors[keys[0]].shape
    assert all(tuple(tensor.shape) == (heads, size, size) for tensor in tensors.values())
    _refuse_non_finite(path, tensors)
    _write(path, tensors)


def save_model(path: PathLike, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a complete model with standard keys in file order, atomically.

    Args:
        tensors: every weight by key; `time_state` of all layers or of none.
        dtype: dtype in the file.

    Raises:
        CheckpointError: The file cannot be written. An existing file is then unchanged.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = key_problems(shapes, ModelShape.from_shapes(shapes))
    assert not problems, problems
    _write(path, {key: _own_copy(tensor, dtype) for key, tensor in tensors.items()})


def merge_state(base_path: PathLike, state_path: PathLike, output_path: PathLike) -> MergeReport:
    """Writes a copy of the base model that starts from the given state.

    Every other tensor is copied bit for bit, in its dtype; a state that the base already has is
    replaced; the new one keeps the dtype of its file. Key prefixes are taken off, because inference
    clients do not know them. Tensors go from the base's memory map to the output one by one.

    Raises:
        CheckpointError: An input cannot be used, the state does not fit the base, the output is one
            of the inputs, or it cannot be written. Nothing is then written.
    """
    for role, source in (("base model", base_path), ("state file", state_path)):
        if _same_file(source, output_path):
            raise CheckpointError(
                f"the output {output_path} is the {role} itself and would overwrite it; give another name"
            )
    base = open_checkpoint(base_path)
    states = load_state(state_path, base.info.shape)
    _write(output_path, {**base, **states})
    return MergeReport(
        shape=base.info.shape,
        base_dtype=base.info.dtype,
        state_dtype=_dtype_name(states[state_key(0)].dtype),
        replaced_state=base.info.has_state,
        size_bytes=os.path.getsize(output_path),
    )


def _read(path: PathLike, role: str) -> tuple[dict[str, Any], str]:
    """The dict in a file, keys without prefix, tensors mapped; and the prefix of its first key.

    Args:
        role: what the file should be, for messages: "model file" or "state file".
    """
    _refuse_other_formats(Path(path), role)
    try:
        content = _load(path)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # Whatever the reader trips over is a property of the file: a damaged archive, a broken or
        # hostile pickle, a record beyond the end.
        raise CheckpointError(_unreadable(path, error)) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a {role}'s dict of names and tensors")
    if not content:
        raise CheckpointError(f"{path} is an empty dict, not a {role}")
    stripped: dict[str, Any] = {}
    for key, value in content.items():
        name = _strip_prefix(key)
        if name in stripped:
            raise CheckpointError(f"{path} holds {name} twice, with and without a prefix; keep one of them")
        stripped[name] = value
    first = next(iter(content))
    return stripped, first.removesuffix(_strip_prefix(first))


def _load(path: PathLike) -> Any:
    """What the file holds, its tensors mapped.

    The map is private and writable, and Linux counts such a map as memory it may have to provide:
    by default it refuses one that is larger than memory and swap together, such as a 14B file on a
    host of 16 GB. Then the file is mapped without that reservation.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    return _load_without_reservation(path)


def _load_without_reservation(path: PathLike) -> Any:
    """As `torch.load` by memory map, with tensors over a map that reserves no memory.

    torch tells at which byte of the file each storage begins. It computes that from the order of
    the records, so each position is compared with the archive's own directory before it is used.
    """
    skeleton = torch.load(path, map_location="meta", weights_only=True)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    with open(path, "rb") as file:
        mapping = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    record_sizes = _record_sizes(path)

    def mapped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mapped(entry) for key, entry in value.items()}
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
            return value
        record = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if record is None:
            raise CheckpointError(
                f"{path} is larger than memory and swap together, and this version of torch cannot map such "
                "a file; update torch, or add swap"
            )
        first = int(value.storage_offset()) * value.itemsize
        count = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if first + count * value.itemsize > record_sizes.get(record, 0):
            raise ValueError(f"no record of {count} values of {value.dtype} begins at byte {record}")
        flat = torch.frombuffer(mapping, dtype=value.dtype, count=count, offset=record + first)
        return flat.as_strided(value.shape, value.stride())

    return mapped(skeleton)


def _record_sizes(path: PathLike) -> dict[int, int]:
    """First byte -> size in bytes of every uncompressed record of a zip archive."""
    fixed_bytes, lengths_at = 30, 26  # of a record's own header; then follow its name and its padding
    sizes = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            if record.compress_type == zipfile.ZIP_STORED:
                file.seek(record.header_offset + lengths_at)
                name_bytes, padding_bytes = struct.unpack("<HH", file.read(4))
                sizes[record.header_offset + fixed_bytes + name_bytes + padding_bytes] = record.file_size
    return sizes


def _refuse_other_formats(path: Path, role: str) -> None:
    """Refuses what is not a zip archive written by `torch.save`, by the file's first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            size_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{role} {path} does not exist; {_what_is_there(path)}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{role} {path} is a directory; name the file itself") from None
    except OSError as error:
        raise CheckpointError(f"{role} {path} cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is incomplete: its {size_bytes} bytes begin like a .pth file, but the directory at "
                "its end is missing; copy or download it again"
            )
        return
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        raise CheckpointError(
            f"{path} is a .pth file in the format of torch before 1.6, which cannot be memory-mapped; "
            f"convert it once with {_conversion(weights_only=True)}"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive as torch wrote before 0.1.10, which cannot be memory-mapped; if you "
            "trust its origin, because loading this format can run code, convert it once with "
            f"{_conversion(weights_only=False)}"
        )
    writer = "PrepareOrpoDataset.py" if role == _PAIR_FILE else "torch.save (.pth)"
    raise CheckpointError(f"{path} is {_describe(head)}, not a {role} written by {writer}")


def _conversion(weights_only: bool) -> str:
    """The command that rewrites a file of an old format."""
    load = f"torch.load('OLD.pth', map_location='cpu', weights_only={weights_only})"
    return f"python -c \"import torch; torch.save({load}, 'NEW.pth')\""


def _describe(head: bytes) -> str:
    """What a file that is no archive of torch looks like, by its first bytes."""
    if not head:
        return "an empty file"
    if head.startswith(b"GGUF"):
        return "a GGUF file (llama.cpp)"
    if head.startswith((b"fmgg", b"lmgg")):
        return "a ggml file (rwkv.cpp)"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file (as converted for web-rwkv and Ai00, with other names and orientations)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the real file)"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "a web page, probably saved instead of the download"
    if head.startswith(b"\x80"):
        return "a Python pickle"
    if not head.strip(b"\0"):
        return "a file of zero bytes, probably an unfinished download"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "a file of unknown format"


def _what_is_there(path: Path, limit: int = 3) -> str:
    """What a user who named a missing file might have meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.glob("*.pth"))
    if not names:
        return f"there is no .pth file in {folder}"
    return f"{folder} holds {', '.join(names[:limit])}{' and more' if len(names) > limit else ''}"


def _unreadable(path: PathLike, error: Exception) -> str:
    """One sentence for what `torch.load` said in many."""
    reason = str(error)
    if "TorchScript" in reason:
        return f"{path} is a TorchScript program, not a dict of tensors"
    global_ = _REFUSED_GLOBAL.search(reason)
    if global_:
        return (
            f"{path} holds a Python object ({global_[1]}) beside tensors, and loading it could run foreign code; "
            "save the dict of tensors alone"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    first_line = reason.strip().splitlines()[0] if reason.strip() else type(error).__name__
    return f"{path} is damaged or not a checkpoint; copy or download it again (torch: {first_line[:200]})"


def _other_kind(keys: Mapping[str, Any]) -> str:
    """Which other kind of file these keys belong to, as the end of a sentence; "" for RWKV-6."""

    def has(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    if has(".lora_A", ".lora_B", ".bone", ".disha"):
        return "holds an unmerged adapter (LoRA, Bone or DiSHA); merge it into its base model first"
    if any(key in keys for key in ("_strategy", "_version", "_rescale_layer")):
        return (
            "was converted by the pip package rwkv (ln0 folded into the embedding, matrices transposed and "
            "rescaled), which cannot be undone; use the original .pth"
        )
    if has("att.r_k"):
        return "is an RWKV-7 model; this program trains RWKV-6 (x060)"
    if has("att.time_maa_rkvw_w1", "att.gate_w1"):
        return "is an experimental RWKV-6 variant (x060a or x060b); this program trains x060"
    if has("att.time_mix_w1", "att.time_mix_x"):
        return "was converted for web-rwkv (renamed keys, axes swapped); use the original .pth"
    if has(".attention.", ".attn."):
        return "has the key names of a Hugging Face conversion; use the original .pth"
    if has("att.time_mix_"):
        version = "RWKV-5" if has("att.ln_x", "att.gate") else "RWKV-4"
        return f"is an {version} model; this program trains RWKV-6 (x060)"
    if not has("att.time_maa_"):
        return f"is no RWKV-6 (x060) model: none of its {len(keys)} keys is a blocks.*.att.time_maa_*"
    return ""


def _strip_prefix(key: str) -> str:
    """The key without leading `_forward_module.` and `model.`, in any order."""
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return _strip_prefix(key.removeprefix(prefix))
    return key


def _float_tensors(path: PathLike, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """`content`, all of it dense floating-point tensors."""
    tensors = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, expected a tensor")
        if value.dtype not in _FLOAT_DTYPES or value.layout != torch.strided:
            hint = " (packed by quantisation?)" if value.dtype in (torch.uint8, torch.int8) else ""
            raise CheckpointError(
                f"{path}: {key} is of {_dtype_name(value.dtype)}{hint}, expected a dense tensor of bfloat16, "
                "float16 or float32"
            )
        tensors[key] = value
    return tensors


def _refuse_non_finite(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{path}: {key} holds {bad} values that are not finite in {_dtype_name(tensor.dtype)}; such "
                "a state makes every output NaN, use an earlier one"
            )


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy on the CPU: a view would drag the whole buffer it lies in into the file."""
    return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _write(path: PathLike, content: dict[str, Tensor] | list[Any]) -> None:
    """Writes tensors or pairs so that `path` is at every moment the old file or the whole new one.

    A link is followed, and what it names is replaced.

    Raises:
        CheckpointError: The file cannot be written; nothing is left beside it.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise CheckpointError(f"{path} is a directory; give the name of the file to write")
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{path} is a device or pipe; give the name of an ordinary file")
    if not target.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {target.parent}; create it first")
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        _flush_folder(target.parent)
    except (OSError, RuntimeError) as error:
        # torch.save puts an error of its own in place of one raised by the file it writes to.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise CheckpointError(
                f"{path} cannot be written: {cause.strerror}; {_size(content)} are needed in {target.parent}"
            ) from error
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None  # an interrupt
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _same_file(first: PathLike, second: PathLike) -> bool:
    """Whether two paths name one file, by links too; the second need not exist."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _size(content: Mapping[str, Tensor] | list[Any]) -> str:
    if isinstance(content, list):
        return f"{len(content)} pairs"
    size_bytes = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in content.values())
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.2f} MiB"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def load_pairs(path: PathLike, vocab_size: int) -> list[PreferencePair]:
    """Reads preference pairs: a `.save` file of `save_pairs` or of RWKV-LM-State-4bit-Orpo.

    Raises:
        CheckpointError: The file is missing, damaged or was not written by `torch.save`.
        DataError: It holds something else, or tokens outside a vocabulary of `vocab_size`.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{_PAIR_FILE} {path} does not exist; make it with PrepareOrpoDataset.py --output_save")
    _refuse_other_formats(Path(path), _PAIR_FILE)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(_unreadable(path, error)) from error
    return pairs_from_tuples(str(path), content, vocab_size)


def save_pairs(path: PathLike, pairs: Sequence[PreferencePair]) -> None:
    """Writes preference pairs as a list of 5-tuples, atomically.

    Raises:
        CheckpointError: The file cannot be written.
    """
    _write(path, [pair.as_tuple() for pair in pairs])
