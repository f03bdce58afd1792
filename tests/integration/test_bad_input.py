"""What a user can get wrong: one clear sentence, exit code 2, nothing half-written."""

import contextlib
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file
from running import metrics, refusal, run_script, started, train, try_train, write_documents

LENGTHS = [30, 12, 25]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of 2 layers, n_embd 32, vocabulary 257."""
    tiny_checkpoint(tmp_path / "base.pth", dtype=torch.bfloat16)
    return tmp_path / "base.pth"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three documents."""
    return write_documents(tmp_path / "documents", LENGTHS)


class TestModelFile:
    def broken(self, path: Path, base: Path, kind: str) -> None:
        """Makes a model file of this kind at `path`."""
        content = base.read_bytes()
        weights = torch.load(base, weights_only=True)
        if kind == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif kind == "truncated at the end":
            path.write_bytes(content[:-100])
        elif kind == "empty":
            path.touch()
        elif kind == "text":
            path.write_text("not a model\n", encoding="utf-8")
        elif kind == "zip of something else":
            shutil.make_archive(str(path.with_suffix("")), "zip", path.parent, "documents.idx")
            path.with_suffix(".zip").rename(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "list":
            torch.save([1, 2, 3], path)
        elif kind == "tensor":
            torch.save(torch.zeros(3), path)
        elif kind == "foreign object":
            torch.save({"emb.weight": Path("x")}, path)
        elif kind == "state file":
            tiny_state_file(path, tiny_shape())
        elif kind == "RWKV-5":
            renamed = {
                key.replace("time_maa", "time_mix"): value
                for key, value in weights.items()
                if not key.endswith(("_w1", "_w2", "maa_x", "maa_w"))
            }
            torch.save(renamed, path)
        elif kind == "incomplete RWKV-7":
            torch.save({"blocks.0.att.r_k": torch.zeros(4, 8), "emb.weight": torch.zeros(257, 32)}, path)
        elif kind == "RWKV-7a":
            torch.save({"blocks.0.att.r_k": torch.zeros(4, 8), "blocks.0.ffn.s_emb.weight": torch.zeros(2, 2)}, path)
        elif kind == "key missing":
            del weights["blocks.1.ffn.value.weight"]
            torch.save(weights, path)
        elif kind == "key superfluous":
            torch.save({**weights, "blocks.1.att.extra": torch.zeros(1)}, path)
        elif kind == "NaN in a row that no document uses":
            weights["emb.weight"][256, 3] = float("nan")
            torch.save(weights, path)
        elif kind == "infinite value in a matrix":
            weights["blocks.1.ffn.value.weight"][3, :2] = float("-inf")
            torch.save(weights, path)
        elif kind == "key misshapen":
            torch.save({**weights, "blocks.1.ffn.value.weight": torch.zeros(32, 7)}, path)
        elif kind == "layer missing":
            torch.save({key: value for key, value in weights.items() if "blocks.0" not in key}, path)
        else:
            assert kind == "missing", kind

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("missing", "does not exist"),
            ("truncated", "incomplete"),
            ("truncated at the end", "incomplete"),
            ("empty", "empty file"),
            ("text", "a text file"),
            ("zip of something else", "damaged or not a checkpoint"),
            ("folder", "is a directory"),
            ("list", "holds a list"),
            ("tensor", "holds a Tensor"),
            ("foreign object", "could run foreign code"),
            ("state file", "is a state file: name the base model"),
            ("RWKV-5", "is an RWKV-5 model"),
            ("incomplete RWKV-7", "is no complete RWKV-7 (x070) model"),
            ("RWKV-7a", "is an RWKV-7a, a research model with embeddings inside its feed-forwards"),
            ("key missing", "blocks.1.ffn.value.weight"),
            ("key superfluous", "blocks.1.att.extra"),
            ("NaN in a row that no document uses", ": 1 of the 8,224 values of emb.weight are not finite"),
            ("infinite value in a matrix", ": 2 of the 3,584 values of blocks.1.ffn.value.weight are not finite"),
            ("key misshapen", "blocks.1.ffn.value.weight"),
            ("layer missing", "layer 0"),
        ],
    )
    def test_is_refused(self, kind: str, expected: str, base: Path, data: Path, tmp_path: Path) -> None:
        path = tmp_path / "broken.pth"
        self.broken(path, base, kind)
        message = refusal(try_train(tmp_path / "out", load_model=path, data_file=data), tmp_path / "out")
        assert str(path) in message
        assert expected in message

    @pytest.mark.parametrize(
        ("flag", "given", "actual"),
        [
            ("n_layer", 24, 2),
            ("n_embd", 2048, 32),
            ("dim_att", 64, 32),
            ("dim_ffn", 96, 112),
            ("vocab_size", 65536, 257),
            ("head_size_a", 64, 8),
        ],
    )
    def test_a_size_that_contradicts_it_is_refused_with_both_numbers(
        self, flag: str, given: int, actual: int, base: Path, data: Path, tmp_path: Path
    ) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, **{flag: given})
        message = refusal(ended, tmp_path / "out")
        assert f"--{flag} {given} contradicts the checkpoint, which has {actual}" in message

    def test_all_sizes_that_contradict_it_are_named_at_once(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(
            tmp_path / "out", load_model=base, data_file=data, n_layer=24, n_embd=2048, double_extra_dim=1
        )
        message = refusal(ended, tmp_path / "out")
        assert all(flag in message for flag in ("--n_layer 24", "--n_embd 2048", "--double_extra_dim 1"))

    @pytest.mark.parametrize(("layers", "expected"), [(3, "the time_state of 3 layers"), (2, "has shape [8, 4, 4]")])
    def test_a_state_of_another_model_is_refused(
        self, layers: int, expected: str, base: Path, data: Path, tmp_path: Path
    ) -> None:
        tiny_state_file(tmp_path / "state.pth", tiny_shape(n_layer=layers, head_size=4))
        ended = try_train(tmp_path / "out", load_model=base, load_state=tmp_path / "state.pth", data_file=data)
        assert expected in refusal(ended, tmp_path / "out")


@pytest.mark.parametrize("flag", ["load_state", "load_adapter"])
def test_a_damaged_file_to_go_on_from_is_refused_before_anything_is_done(
    flag: str, base: Path, data: Path, tmp_path: Path
) -> None:
    """Whatever --overwrite 1 would remove is still there."""
    path, out = tmp_path / "damaged.pth", tmp_path / "out"
    if flag == "load_state":
        tiny_state_file(path, tiny_shape())
    else:
        tiny_adapter(path, tiny_shape(), "bone")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    out.mkdir()
    (out / "rwkv-final.pth").write_bytes(b"earlier")
    peft = {"peft": "bone", "bone_r": 8} if flag == "load_adapter" else {}
    ended = try_train(out, load_model=base, data_file=data, overwrite=1, **{flag: path}, **peft)
    assert ended.code == 2
    assert str(path) in ended.err
    assert "model " not in ended.out
    assert (out / "rwkv-final.pth").read_bytes() == b"earlier"


def no_index(prefix: Path) -> None:
    """Only the tokens."""
    prefix.with_suffix(".idx").unlink()


def no_tokens(prefix: Path) -> None:
    """Only the index."""
    prefix.with_suffix(".bin").unlink()


def shorter_tokens(prefix: Path) -> None:
    """The token file lost its last byte."""
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1])


def index_of_other_data(prefix: Path) -> None:
    """The index of a file with one document more."""
    tokens = prefix.with_suffix(".bin").read_bytes()
    write_documents(prefix, [*LENGTHS, 5])
    prefix.with_suffix(".bin").write_bytes(tokens)


def cut_index(prefix: Path) -> None:
    """The index lost its end."""
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-8])


def foreign_index(prefix: Path) -> None:
    """Another kind of file under the index's name."""
    prefix.with_suffix(".idx").write_bytes(b"PK\3\4" + bytes(100))


def floating_tokens(prefix: Path) -> None:
    """A dtype code that means float."""
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    struct.pack_into("<B", content, 17, 6)
    path.write_bytes(content)


def another_vocabulary(prefix: Path) -> None:
    """A token beyond the model's 257."""
    write_binidx(prefix, [[1, 2, 0], [3, 257, 0]])


def no_documents(prefix: Path) -> None:
    """An index of nothing."""
    write_binidx(prefix, [])


def empty_documents(prefix: Path) -> None:
    """Documents without tokens."""
    write_binidx(prefix, [[], []])


def single_tokens(prefix: Path) -> None:
    """Documents of one token each."""
    write_binidx(prefix, [[0], [0], [0]])


class TestBinidx:
    @pytest.mark.parametrize(
        ("spoil", "expected"),
        [
            (no_index, "documents.idx is missing"),
            (no_tokens, "documents.bin is missing"),
            (shorter_tokens, "disagree"),
            (index_of_other_data, "disagree"),
            (cut_index, "is damaged"),
            (foreign_index, "is no binidx index"),
            (floating_tokens, "floating-point"),
            (another_vocabulary, "token id 257 in document 1"),
            (no_documents, "is empty"),
            (empty_documents, "is empty"),
            (single_tokens, "one token"),
        ],
        ids=lambda value: value.__name__ if callable(value) else "",
    )
    def test_is_refused(
        self, spoil: Callable[[Path], None], expected: str, base: Path, data: Path, tmp_path: Path
    ) -> None:
        spoil(data)
        ended = try_train(tmp_path / "out", load_model=base, data_file=data)
        assert expected in refusal(ended, tmp_path / "out")

    def test_held_out_data_too(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, val_file=tmp_path / "absent")
        assert "absent.idx is missing" in refusal(ended, tmp_path / "out")

    @pytest.mark.parametrize("ctx_len", [66, 67, 4096])
    def test_get_needs_more_than_a_window(self, ctx_len: int, base: Path, data: Path, tmp_path: Path) -> None:
        total = sum(LENGTHS)
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, dataload="get", ctx_len=ctx_len)
        message = refusal(ended, tmp_path / "out")
        assert f"{total} tokens" in message
        assert f"= {ctx_len + 1} " in message

    def test_get_works_on_one_token_more_than_a_window(self, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1}
        train(tmp_path / "out", dataload="get", ctx_len=sum(LENGTHS) - 2, **flags)
        assert len(metrics(tmp_path / "out")) == 1


class TestText:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"text": "a"', "not valid JSON"),
            ('{"text": "a"} {"text": "b"}', "not valid JSON"),
            ('["a"]', "expected an object"),
            ('{"txt": "a"}', "text"),
            ('{"text": 5}', "text"),
            ('{"prompt": "a"}', "response"),
            ('{"messages": [{"role": "robot", "content": "a"}]}', "robot"),
            ('{"messages": [{"role": "user"}]}', "content"),
        ],
    )
    def test_a_malformed_line_is_named(self, line: str, reason: str, base: Path, tmp_path: Path) -> None:
        path = tmp_path / "lines.jsonl"
        path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n", encoding="utf-8")
        message = refusal(try_train(tmp_path / "out", load_model=base, data_file=path), tmp_path / "out")
        assert f"{path}, line 3: " in message
        assert reason in message

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("empty.jsonl", b"", "is empty"),
            ("blank.jsonl", b"\n\n\n", "is empty"),
            ("empty.txt", b"", "is empty"),
            ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
            ("latin.jsonl", '{"text": "é"}'.encode("latin-1"), "line 1: not UTF-8"),
            ("wide.txt", "text".encode("utf-16"), "is UTF-16"),
            ("silent.jsonl", b'{"text": ""}\n', "one token"),
        ],
    )
    def test_unusable_files(self, name: str, content: bytes, expected: str, base: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        ended = try_train(tmp_path / "out", load_model=base, data_file=tmp_path / name)
        assert expected in refusal(ended, tmp_path / "out")

    @pytest.mark.parametrize("data_type", ["jsonl", "utf-8"])
    def test_a_missing_file(self, data_type: str, base: Path, tmp_path: Path) -> None:
        path = tmp_path / "absent"
        ended = try_train(tmp_path / "out", load_model=base, data_file=path, data_type=data_type)
        assert f"{path} does not exist" in refusal(ended, tmp_path / "out")

    def test_text_with_a_vocabulary_of_no_known_tokenizer(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", vocab_size=256)
        path = tmp_path / "lines.jsonl"
        path.write_text('{"text": "a"}\n', encoding="utf-8")
        ended = try_train(tmp_path / "out", load_model=tmp_path / "base.pth", data_file=path)
        assert "256" in refusal(ended, tmp_path / "out")


class TestOutput:
    @pytest.mark.parametrize("kind", ["a pipe", "a broken link", "a loop"])
    def test_what_is_no_folder(self, kind: str, base: Path, data: Path, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        if kind == "a pipe":
            os.mkfifo(folder)
        else:
            folder.symlink_to(folder if kind == "a loop" else tmp_path / "nowhere")
        message = refusal(try_train(folder, load_model=base, data_file=data), folder)
        assert message == f"--proj_dir {folder} cannot be written: it is not a folder; choose another"

    @pytest.mark.parametrize("leftover", ["pairs-prompts.csv", "pairs-rejects.csv", "pairs-rejects.csv.run.json"])
    def test_a_demonstration_whose_files_are_in_the_way(self, leftover: str, tmp_path: Path) -> None:
        (tmp_path / leftover).mkdir()
        message = refusal(run_script("train.py", demo="orpo", proj_dir=tmp_path, accelerator="cpu"), tmp_path)
        assert message.startswith(f"--proj_dir {tmp_path} cannot be written ({tmp_path / leftover}: ")

    @pytest.mark.parametrize("place", ["a file", "below a file"])
    def test_a_folder_that_cannot_be(self, place: str, base: Path, data: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        folder = tmp_path / "file" if place == "a file" else tmp_path / "file" / "out"
        message = refusal(try_train(folder, load_model=base, data_file=data), folder)
        assert f"--proj_dir {folder} cannot be written" in message
        assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"

    @pytest.mark.parametrize("name", ["rwkv-final.pth", "rwkv-0.pth"])
    def test_a_base_model_is_not_written_over(self, name: str, base: Path, data: Path, tmp_path: Path) -> None:
        trained = tmp_path / name
        trained.write_bytes(base.read_bytes())
        ended = try_train(tmp_path, load_model=trained, data_file=data, epoch_count=1, overwrite=1)
        assert ended.code == 2
        assert "would be written over" in ended.err
        assert trained.read_bytes() == base.read_bytes()

    @pytest.mark.parametrize("output", ["rwkv-final.pth", "rwkv-0.pth", "rwkv-last-good.pth", "metrics.jsonl"])
    @pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
    @pytest.mark.parametrize("flag", ["load_model", "load_state", "data_file"])
    def test_no_input_is_written_over_through_a_link(
        self, output: str, link: Callable[[Path, Path], None], flag: str, base: Path, data: Path, tmp_path: Path
    ) -> None:
        tiny_state_file(tmp_path / "state.pth", tiny_shape())
        inputs = {"load_model": base, "load_state": tmp_path / "state.pth", "data_file": data}
        linked = data.with_name(f"{data.name}.bin") if flag == "data_file" else inputs[flag]
        before = linked.read_bytes()
        (tmp_path / "out").mkdir()
        link(tmp_path / "out" / output, linked)
        ended = try_train(tmp_path / "out", **inputs, epoch_count=1, overwrite=1)
        assert ended.code == 2
        assert "would be written over" in ended.err
        assert flag in ended.err
        assert linked.read_bytes() == before

    def test_a_link_in_the_folder_is_not_followed(self, base: Path, data: Path, tmp_path: Path) -> None:
        (tmp_path / "precious.pth").write_bytes(b"mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "rwkv-final.pth").symlink_to(tmp_path / "precious.pth")
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, overwrite=1)
        assert ended.code == 2
        assert f"rwkv-final.pth is a link to {tmp_path / 'precious.pth'}" in ended.err
        assert (tmp_path / "precious.pth").read_bytes() == b"mine"

    def test_a_state_of_an_epoch_that_is_not_trained_again_may_lie_in_the_folder(
        self, base: Path, data: Path, tmp_path: Path
    ) -> None:
        train(tmp_path / "out", load_model=base, data_file=data, epoch_count=1, epoch_steps=2)
        flags = {"load_model": base, "data_file": data, "epoch_begin": 1, "epoch_count": 2, "epoch_steps": 2}
        train(tmp_path / "out", **flags, load_state=tmp_path / "out" / "rwkv-0.pth", overwrite=1)
        assert (tmp_path / "out" / "rwkv-0.pth").exists()

    def test_a_read_only_folder(self, base: Path, data: Path, tmp_path: Path) -> None:
        folder = Path("/proc/rwkv-out") if Path("/proc/self").exists() else tmp_path / "locked" / "out"
        if folder.parent == tmp_path / "locked":
            folder.parent.mkdir(mode=0o500)
        message = refusal(try_train(folder, load_model=base, data_file=data), folder)
        assert f"--proj_dir {folder} cannot be written" in message

    @pytest.mark.parametrize("there", [True, False])
    def test_a_full_disk_is_seen_before_anything_is_read(self, there: bool, base: Path, tmp_path: Path) -> None:
        (tmp_path / "broken.jsonl").write_text("{")
        if there:
            (tmp_path / "out").mkdir()
        with no_file_beyond(1024):
            ended = try_train(tmp_path / "out", load_model=base, data_file=tmp_path / "broken.jsonl")
        message = refusal(ended, tmp_path / "out")
        assert f"--proj_dir {tmp_path / 'out'} cannot be written" in message

    @pytest.mark.parametrize("folder", ["file", "file/out", "link/out"])
    def test_a_folder_that_cannot_be_is_seen_before_anything_is_read(
        self, folder: str, base: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "broken.jsonl").write_text("{")
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        ended = try_train(tmp_path / folder, load_model=base, data_file=tmp_path / "broken.jsonl")
        assert ended.code == 2
        assert ended.err.startswith(f"error: --proj_dir {tmp_path / folder} cannot be written")

    def test_a_disk_that_fills_up_leaves_no_half_checkpoint(self, data: Path, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "wide.pth", n_layer=3, n_embd=64, head_size=32)
        flags = {"load_model": tmp_path / "wide.pth", "data_file": data, "epoch_steps": 1, "epoch_count": 1}
        with no_file_beyond(8192):
            ended = try_train(tmp_path / "out", **flags)
        assert "warning: " in ended.err
        assert "rwkv-0.pth cannot be written: File too large" in ended.err
        message = refusal(ended, tmp_path / "out")
        assert "rwkv-final.pth cannot be written: File too large" in message
        assert "MiB are needed" in message


@contextlib.contextmanager
def no_file_beyond(size_bytes: int) -> Iterator[None]:
    """Inside, no file of this process can grow beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestFlags:
    def test_a_quant_type_that_does_not_exist(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, quant=1, quant_type="nf5")
        message = refusal(ended, tmp_path / "out")
        assert message == "--quant_type nf5 is unknown: use one of nf4, fp4, 4bit, int8"
        assert not (tmp_path / "out").exists()

    def test_contradictions_are_reported_all_at_once_before_anything_is_read(self, tmp_path: Path) -> None:
        ended = try_train(
            tmp_path / "out", load_model=tmp_path / "absent.pth", data_file=tmp_path / "absent", quant=1,
            strategy="deepspeed_stage_3", dataload="only", micro_bsz=2, precision="fp16",
        )  # fmt: skip
        assert ended.code == 2
        assert ended.err.startswith("error: 3 problems:\n")
        assert len(ended.err.splitlines()) == 4
        assert all(flag in ended.err for flag in ("--strategy", "--micro_bsz", "--precision"))
        assert not (tmp_path / "out").exists()

    def test_an_unknown_flag_suggests_the_nearest(self, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", ctxlen=512)
        assert refusal(ended, tmp_path / "out") == "unknown flag --ctxlen: did you mean --ctx_len?"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    @pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
    def test_a_gpu_where_there_is_none(self, accelerator: str, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, accelerator=accelerator)
        message = refusal(ended, tmp_path / "out")
        assert f"--accelerator {accelerator}" in message
        assert "no CUDA GPU" in message

    def test_several_devices_on_a_cpu(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, devices=2)
        assert "--devices 2" in refusal(ended, tmp_path / "out")

    def test_my_exit_before_the_first_epoch(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, epoch_begin=2, my_exit=0)
        assert "--my_exit 0" in refusal(ended, tmp_path / "out")


class TestOwnProcess:
    """The same through a process of its own: nothing but the sentence reaches stderr."""

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            pytest.param(
                ("--load_model", "absent.pth", "--data_file", "absent"),
                "error: model file absent.pth does not exist",
                id="late",
                marks=pytest.mark.slow,
            ),
            pytest.param(("--quant_type", "nf5", "--ctx_len", "0"), "error: 4 problems:", id="early"),
        ],
    )
    def test_exit_code_and_stderr(
        self, words: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with started("train.py", *words) as process:
            out, err = process.communicate(timeout=600)
        assert process.returncode == 2
        assert err.startswith(expected)
        assert len(err.splitlines()) == (1 if "problems" not in err else 5)
        assert out == ""
        assert not list(tmp_path.rglob("*.pth"))
