"""Files that are cut short, overwritten or replaced while a program uses them: noticed, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file
from running import Ended, after_step, go_on, metrics, refusal, run_script, train, try_train, write_documents
from torch import Tensor

from src import storage
from src.data import binidx

STEPS = {"epoch_steps": 4, "epoch_count": 1}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """In fp32, the dtype it is computed in, so that nothing needs a copy of its tensors."""
    tiny_checkpoint(tmp_path / "base.pth")
    return tmp_path / "base.pth"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents", [30, 12, 25, 18, 9, 33])


def cut(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "overwritten": overwrite,
    "replaced": replace,
    "removed": Path.unlink,
}

METHODS: dict[str, dict[str, object]] = {
    "states": {},
    "states in bf16": {"precision": "bf16"},
    "states beside nf4": {"quant": 1},
    "lora": {"peft": "lora", "lora_r": 2},
    "pissa": {"peft": "pissa", "pissa_r": 2},
    "all weights": {"train_type": "none", "ctx_len": 16},
}


def same_final(one: Path, other: Path) -> bool:
    first, second = (torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextlib.contextmanager
def changed_at_read(number: int, path: Path, change: Callable[[Path], None]) -> Iterator[None]:
    """Inside, a file is changed just before the so many-th tensor is read from it."""
    read, seen = storage.TensorFile.read, []

    def reading(self: storage.TensorFile, outline: Tensor, **options: Any) -> Tensor:
        seen.append(outline)
        if len(seen) == number:
            change(path)
        return read(self, outline, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.TensorFile, "read", reading)
        yield
    assert len(seen) >= number


class TestBaseUnderARun:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_not_needed_any_more(self, method: str, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, **STEPS, **METHODS[method]}
        train(tmp_path / "whole", **flags)
        content = base.read_bytes()
        for name, change in CHANGES.items() if method == "states" else [("cut", cut)]:
            base.write_bytes(content)
            with after_step(2, lambda stopper, change=change: change(base)):  # type: ignore[misc]
                train(tmp_path / name, **flags)
            assert same_final(tmp_path / "whole", tmp_path / name), name

    def test_what_cannot_be_measured_on_it_is_said(self, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, "val_file": data, "quant": 1, **STEPS}
        with after_step(2, lambda stopper: cut(base)):
            ended = train(tmp_path / "out", **flags)
        assert "held-out data were not measured on the unpacked base" in ended.out
        assert f"{base} was changed while the program reads it" in ended.out
        assert (tmp_path / "out" / "rwkv-final.pth").exists()

    def test_a_stopped_run_does_not_go_on_with_another(self, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, **STEPS}
        train(tmp_path / "whole", **flags)
        content = base.read_bytes()

        def change_and_stop(stopper: Any) -> None:
            overwrite(base)
            stopper.signal_name = "SIGTERM"

        with after_step(2, change_and_stop):
            train(tmp_path / "out", **flags)
        ended = run_script("train.py", proj_dir=tmp_path / "out", resume=1)
        assert ended.code == 2
        assert str(base) in ended.err
        base.write_bytes(content)
        go_on(tmp_path / "out")
        assert same_final(tmp_path / "whole", tmp_path / "out")


class TestDataUnderARun:
    """Large token files stay on the disk; smaller ones are in memory, and what happens to them is of no matter."""

    @pytest.fixture(autouse=True)
    def all_are_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(binidx, "_IN_MEMORY_BYTES", 0)

    @pytest.mark.parametrize("change", [cut, overwrite])
    def test_what_was_trained_is_saved(
        self, change: Callable[[Path], None], base: Path, data: Path, tmp_path: Path
    ) -> None:
        flags = {"load_model": base, "data_file": data, "epoch_steps": 6, "epoch_count": 2}
        train(tmp_path / "whole", **flags)
        tokens = Path(f"{data}.bin")
        content, times = tokens.read_bytes(), tokens.stat()
        with after_step(3, lambda stopper: change(tokens)):
            ended = try_train(tmp_path / "out", **flags)
        assert ended.code == 2
        assert f"{tokens} was changed while the program reads it" in ended.err
        assert f"--proj_dir {tmp_path / 'out'} --resume 1" in ended.out
        done = len(metrics(tmp_path / "out"))
        tokens.write_bytes(content)
        os.utime(tokens, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert f"after step {done}," in go_on(tmp_path / "out").out
        assert same_final(tmp_path / "whole", tmp_path / "out")

    def test_held_out_data_that_changed_cost_the_measurement(self, base: Path, data: Path, tmp_path: Path) -> None:
        held_out = write_documents(tmp_path / "held-out", [20, 30], seed=1)
        flags = {"load_model": base, "data_file": data, **STEPS}
        train(tmp_path / "whole", **flags)
        with after_step(2, lambda stopper: cut(Path(f"{held_out}.bin"))):
            ended = try_train(tmp_path / "out", val_file=held_out, **flags)
        assert same_final(tmp_path / "whole", tmp_path / "out")
        assert ended.code in (0, 2)
        assert "Traceback" not in ended.err
        if ended.code:
            assert "was changed while the program reads it" in ended.err


class TestWhileItIsRead:
    """In the middle of a base model's tensors."""

    @pytest.mark.parametrize("change", [cut, overwrite])
    def test_training(self, change: Callable[[Path], None], base: Path, data: Path, tmp_path: Path) -> None:
        with changed_at_read(5, base, change):
            ended = try_train(tmp_path / "out", load_model=base, data_file=data, **STEPS)
        assert f"{base} was changed while the program reads it" in refusal(ended, tmp_path / "out")

    @pytest.mark.parametrize("change", [cut, overwrite])
    @pytest.mark.parametrize("what", ["state", "adapter"])
    def test_merging(self, what: str, change: Callable[[Path], None], base: Path, tmp_path: Path) -> None:
        trained = tmp_path / "trained.pth"
        if what == "state":
            tiny_state_file(trained, tiny_shape())
        else:
            tiny_adapter(trained, tiny_shape(), "bone")
        with changed_at_read(9, base, change):
            ended = run_script("merge_state.py", base, trained, tmp_path / "merged.pth")
        assert_refused(ended, base)
        assert not [path for path in tmp_path.iterdir() if "merged" in path.name]

    def test_rejects(self, base: Path, tmp_path: Path) -> None:
        flags = self.rows(tmp_path, load_model=base, output_csv=tmp_path / "out.csv", max_tokens=3)
        with changed_at_read(5, base, cut):
            ended = run_script("rlhf_generate_reject.py", **flags)
        assert_refused(ended, base)

    def test_base_logps(self, base: Path, tmp_path: Path) -> None:
        flags = self.rows(
            tmp_path, load_model=base, output_save=tmp_path / "out.save", base_logp=1, target_pair_count=2
        )
        with changed_at_read(5, base, cut):
            ended = run_script("PrepareOrpoDataset.py", **flags)
        assert_refused(ended, base)
        assert not (tmp_path / "out.save").exists()

    def rows(self, folder: Path, **flags: object) -> dict[str, object]:
        (folder / "rows.csv").write_text("prompt,chosen,reject\na,b,c\nd,e,\n", encoding="utf-8")
        return {"input_csv": folder / "rows.csv", "accelerator": "cpu", **flags}


def assert_refused(ended: Ended, base: Path) -> None:
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert f"error: {base} was changed while the program reads it" in ended.err


def test_a_run_file_that_is_cut_while_it_is_read(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 2, "epoch_count": 3}
    train(tmp_path / "whole", **flags)
    with after_step(5, lambda stopper: setattr(stopper, "signal_name", "SIGTERM")):
        train(tmp_path / "out", **flags)
    run_file = tmp_path / "out" / "rwkv-resume.pth"
    content = run_file.read_bytes()
    with changed_at_read(1, run_file, lambda path: None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.StoredDict, "__getitem__", cut_before(run_file, storage.StoredDict.__getitem__))
        ended = run_script("train.py", proj_dir=tmp_path / "out", resume=1)
    assert_refused(ended, run_file)
    run_file.write_bytes(content)
    go_on(tmp_path / "out")
    assert same_final(tmp_path / "whole", tmp_path / "out")


def cut_before(path: Path, get: Callable[[storage.StoredDict, str], Any]) -> Callable[[storage.StoredDict, str], Any]:
    """Cuts the file when the moments are asked for."""

    def getting(self: storage.StoredDict, key: str) -> Any:
        if key == "optimizer":
            cut(path)
        return get(self, key)

    return getting
