"""Parts of a run that can be put back, without a run."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import storage
from src.config import TrainConfig
from src.errors import CheckpointError, ConfigError
from src.schedule import Schedule
from src.training.folder import PREVIOUS, RESUME, Places
from src.training.objectives import PreferenceObjective, SFTObjective
from src.training.progress import Start
from src.training.resume import (
    OptimizerMoments,
    RandomState,
    RunWriter,
    SavedRun,
    Session,
    Settled,
    TrainedTensors,
    check_flags,
    completed_flags,
    fingerprints,
    saved_run,
    values_of,
)
from src.training.saver import RunSaver
from src.training.stopper import Stopper


def named(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in (("a", (3, 4)), ("b", (5,)))}


def stepped(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([parameter.pow(3).sum() for parameter in parameters.values()]).sum().backward()
        optimizer.step()


def a_run(folder: Path, steps: int = 1, **parts: Any) -> SavedRun:
    return SavedRun(folder, "run", steps, {"given": {"lr_init": "0.5"}}, {}, {}, parts, None)


@pytest.mark.parametrize(
    ("steps", "start"), [(0, Start()), (3, Start(3, 0, 6)), (5, Start(5, 1, 0)), (12, Start(12, 2, 4))]
)
def test_where_a_run_is_after_so_many_steps(steps: int, start: Start) -> None:
    assert Start.after(steps, steps_per_epoch=5, accumulate=2) == start


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_tensors_and_moments_go_on_with_the_same_bits(kind: Any) -> None:
    """In another order of groups, too: keys tell which is which."""
    one, other = named(0), named(1)
    first = kind([{"params": [one["a"]], "mark": 1}, {"params": [one["b"]], "mark": 2}], lr=0.01)
    stepped(one, first, 3)
    tensors, moments = TrainedTensors(one.items()).state(), OptimizerMoments(one.items(), first, engine=False).state()
    kept = copy.deepcopy({"tensors": tensors, "moments": moments})
    second = kind([{"params": [other["b"]], "mark": 2}, {"params": [other["a"]], "mark": 1}], lr=0.01)
    TrainedTensors(other.items()).restore(kept["tensors"])
    OptimizerMoments(other.items(), second, engine=False).restore(kept["moments"])
    assert [group["mark"] for group in second.param_groups] == [2, 1]
    stepped(one, first, 2)
    stepped(other, second, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_numbers_go_on() -> None:
    part = RandomState(torch.device("cpu"))
    state = part.state()
    drawn = torch.rand(5)
    part.restore(state)
    assert torch.equal(torch.rand(5), drawn)


def test_each_rank_has_its_own_random_numbers() -> None:
    def gather(state: Tensor) -> Tensor:
        return torch.stack([torch.Generator().manual_seed(rank).get_state() for rank in range(2)])

    state = RandomState(torch.device("cpu"), 0, gather).state()
    RandomState(torch.device("cpu"), 1).restore(state)
    assert torch.initial_seed() == 1
    before = torch.get_rng_state()
    RandomState(torch.device("cpu"), 2).restore(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_objectives() -> None:
    assert SFTObjective().state() == {}
    one, other = PreferenceObjective(0.5, 0), PreferenceObjective(0.5, 0)
    one._running_preference = 0.75
    other.restore(one.state())
    assert other.state() == {"running_preference": 0.75}


class TestWriter:
    def test_a_snapshot_is_what_was_when_it_was_taken(self, tmp_path: Path) -> None:
        tensor = torch.zeros(4)
        writer = RunWriter(Places(tmp_path, "run", pytest.fail))
        writer.write(a_run(tmp_path, part={"x": tensor}))
        tensor.fill_(1)
        writer.wait()
        assert not saved_run(tmp_path).parts["part"]["x"].any()
        assert (writer.folder, writer.step, writer.bytes) == (tmp_path, 1, 16)

    def test_what_is_settled_is_written_without_a_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[Any] = []
        save = storage.save
        monkeypatch.setattr(
            storage, "save", lambda path, content, **more: (written.append(content), save(path, content))
        )
        settled, other = torch.arange(3.0), torch.arange(4.0)
        writer = RunWriter(Places(tmp_path, "run", pytest.fail))
        writer.write(a_run(tmp_path, part={"x": Settled(settled), "y": other}))
        writer.wait()
        part = written[0]["parts"]["part"]
        assert part["x"] is settled
        assert part["y"] is not other
        assert writer.bytes == 28
        assert torch.equal(saved_run(tmp_path).parts["part"]["x"], settled)

    def test_two_generations_are_kept(self, tmp_path: Path) -> None:
        writer = RunWriter(Places(tmp_path, "run", pytest.fail))
        for step in (1, 2, 3):
            writer.write(a_run(tmp_path, step))
        writer.wait()
        assert {path.name for path in tmp_path.iterdir()} == {RESUME, PREVIOUS}
        steps = [storage.load(tmp_path / name, "run file")["steps"] for name in (RESUME, PREVIOUS)]
        assert steps == [3, 2]
        writer.remove()
        assert not list(tmp_path.iterdir())

    def test_a_failure_is_said_and_the_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path, content: Any, previous: Path) -> None:
            raise CheckpointError(f"{path} is full") from OSError("full")

        said: list[str] = []
        monkeypatch.setattr(storage, "save", fail)
        writer = RunWriter(Places(tmp_path / "out", "run", said.append))
        for step in (1, 2):
            writer.write(a_run(tmp_path, step))
        writer.wait()
        assert len(said) == 1
        assert "training goes on" in said[0]
        assert writer.folder is None


class TestFile:
    def test_the_newest_that_can_be_read(self, tmp_path: Path) -> None:
        writer = RunWriter(Places(tmp_path, "run", pytest.fail))
        for step in (1, 2):
            writer.write(a_run(tmp_path, step))
        writer.wait()
        assert (saved_run(tmp_path).steps, saved_run(tmp_path).notes) == (2, ())
        (tmp_path / RESUME).write_bytes(b"")
        fallen_back = saved_run(tmp_path)
        assert fallen_back.steps == 1
        assert "going on from the save before it" in fallen_back.notes[0]

    @pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"format": 1}, {"format": 99}, [1]])
    def test_other_files_are_refused(self, content: Any, tmp_path: Path) -> None:
        storage.save(tmp_path / RESUME, content)
        with pytest.raises(CheckpointError, match="begin the run anew"):
            saved_run(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nothing to go on with .*there is no rwkv-resume.pth"):
            saved_run(tmp_path)

    def test_flags_that_are_not_given_are_those_of_the_file(self, tmp_path: Path) -> None:
        writer = RunWriter(Places(tmp_path, "run", pytest.fail))
        writer.write(a_run(tmp_path))
        writer.wait()
        given = {"proj_dir": str(tmp_path), "resume": "1"}
        assert completed_flags(given) == {**given, "lr_init": "0.5"}
        assert completed_flags({**given, "lr_init": "2"})["lr_init"] == "2"


@pytest.mark.parametrize(
    "flags",
    [
        {"load_model": "b.pth", "data_file": "d"},
        {"load_model": "b.pth", "data_file": "d", "quant": "0", "lr_init": "0.1", "adam_eps": "1e-9", "ctx_len": "7"},
        {"load_model": "b.pth", "orpo": "1", "rlhf_train_file": "x.save"},
        {"train_type": "none", "n_layer": "2", "n_embd": "64", "vocab_size": "9", "data_file": "d", "dataload": "pad"},
    ],
)
def test_the_flags_kept_make_the_same_configuration(flags: dict[str, str]) -> None:
    config = TrainConfig.from_flags({**flags, "proj_dir": "somewhere"})
    again = TrainConfig.from_flags({"proj_dir": "somewhere", **values_of(config, "fp32")["given"]})
    assert again == config


def test_a_fingerprint_follows_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.training.resume._HASHED_BYTES", 1000)
    seen = set()
    for place in (None, 0, 5_000_000, 9_999_999):
        content = bytearray(10_000_000)
        if place is not None:
            content[place] = 1
        (tmp_path / "data.bin").write_bytes(content)
        (tmp_path / "data.idx").write_bytes(b"index")
        config = TrainConfig.from_flags({"load_model": "b.pth", "data_file": str(tmp_path / "data")})
        seen.add(fingerprints(config)["data_file"])
    assert len(seen) == 4


class TestSaver:
    class Loop:
        """What the callback reads of a trainer."""

        global_step = 0
        world_size = 1
        should_stop = False
        is_global_zero = True

    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, **ends: int) -> list[int]:
        """Steps of two epochs of four; after which of them a snapshot was taken."""
        taken: list[int] = []
        monkeypatch.setattr(RunWriter, "write", lambda self, saved: taken.append(saved.steps))
        stopper = Stopper(Schedule(1.0, 0.1, 0, 10), accumulate=2)
        session = Session(a_run(tmp_path, 0), RunWriter(Places(tmp_path, "run", pytest.fail)), seconds)
        saver = RunSaver(session, lambda trainer: {}, stopper, Start(), 4, 8)
        loop: Any = self.Loop()
        saver.on_train_start(loop, None)
        for step in range(1, 9):
            saver.on_train_batch_end(loop, None, None, None, 0)
            loop.global_step = step
            stopper._wants_save = step == ends.get("asked")
            loop.should_stop = step == ends.get("stopped")
            saver.on_train_batch_end(loop, None, None, None, 1)
            if step % 4 == 0 or loop.should_stop:
                saver.on_train_epoch_end(loop, None)
            if loop.should_stop:
                break
        return taken

    @pytest.mark.parametrize(
        ("seconds", "ends", "expected"),
        [
            (0.0, {}, [4]),
            (1e-9, {}, [1, 2, 3, 4, 5, 6, 7]),
            (0.0, {"asked": 2}, [2, 4]),
            (0.0, {"asked": 4}, [4]),
            (0.0, {"stopped": 6}, [4, 6]),
            (0.0, {"stopped": 4}, [4]),
            (0.0, {"stopped": 8}, [4]),
        ],
    )
    def test_when(
        self, seconds: float, ends: dict[str, int], expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.run(tmp_path, monkeypatch, seconds, **ends) == expected


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("single", "replicas", []),
        ("single", "deepspeed_stage_2", ["--strategy deepspeed_stage_2 was auto before"]),
        ("deepspeed_stage_2", "single", ["--strategy auto was deepspeed_stage_2 before"]),
        ("replicas", "deepspeed_stage_1", ["--strategy deepspeed_stage_1 was auto before"]),
    ],
)
def test_what_a_run_chose_is_told_as_a_flag_names_it(before: str, now: str, said: list[str]) -> None:
    config = TrainConfig.from_flags({"load_model": "m.pth", "data_file": "data"})
    then = values_of(dataclasses.replace(config, strategy=before), "fp32")
    saved = SavedRun(Path("run"), "run", 1, then, {}, {}, {}, None)
    notes = check_flags(dataclasses.replace(config, strategy=now), "fp32", {}, saved)
    assert [note.split(";")[0] for note in notes] == said
