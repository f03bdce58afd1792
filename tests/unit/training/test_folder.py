"""A run's folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from src import storage
from src.errors import CheckpointError, ConfigError
from src.training.folder import LOCK, LineFile, Places, clean, locked, refuse_results


class TestLock:
    def test_the_second_is_refused_and_told_who_has_it(self, tmp_path: Path) -> None:
        with locked(tmp_path):
            taken = rf"belongs to a run that is going on \(process {os.getpid()} on "
            with pytest.raises(ConfigError, match=taken), locked(tmp_path):
                raise AssertionError
            assert (tmp_path / LOCK).exists()
        assert not (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass

    def test_a_killed_run_leaves_no_lock(self, tmp_path: Path) -> None:
        script = "import os, sys; from pathlib import Path; from src.training.folder import locked\n"
        script += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
        killed = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, check=False)
        assert killed.returncode == -9
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass

    def test_an_error_inside_gives_it_back(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
        with locked(tmp_path):
            pass

    def test_a_lock_that_cannot_be_made_is_the_folders_fault(self, tmp_path: Path) -> None:
        (tmp_path / LOCK).mkdir()
        with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path):
            pass


class TestResults:
    @pytest.mark.parametrize("name", ["rwkv-final.pth", "rwkv-12.pth"])
    def test_results_are_refused_with_both_ways_out(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"{name}.* another --proj_dir, or --overwrite 1"):
            refuse_results(tmp_path)

    def test_a_stopped_run_has_three_ways_out(self, tmp_path: Path) -> None:
        for name in ("rwkv-final.pth", "rwkv-resume-previous.pth"):
            (tmp_path / name).touch()
        with pytest.raises(ConfigError, match="--resume 1 goes on with it, --overwrite 1 removes it and begins anew"):
            refuse_results(tmp_path)

    def test_logs_and_other_models_are_no_results(self, tmp_path: Path) -> None:
        for name in ("metrics.jsonl", "train_log.txt", "rwkv-last-good.pth", "rwkv-mine.pth", "base.pth"):
            (tmp_path / name).touch()
        refuse_results(tmp_path)
        (tmp_path / "rwkv-0.pth").touch()
        with pytest.raises(ConfigError, match=r"\(rwkv-0\.pth\)"):
            refuse_results(tmp_path)

    def test_only_what_this_program_writes_is_removed(self, tmp_path: Path) -> None:
        left = [".rwkv-3.pth.0123abcd.unfinished", ".rwkv-resume.pth.0123abcd-old.unfinished"]
        results = ["rwkv-0.pth", "rwkv-12.pth", "rwkv-final.pth", "rwkv-resume.pth", "rwkv-last-good.pth"]
        others = [
            ".mine.pth.0123abcd.unfinished",
            "rwkv-x.pth",
            "merged.pth",
            "metrics.jsonl",
            ".rwkv-3.pth.unfinished",
        ]
        for name in [*left, *results, *others]:
            (tmp_path / name).touch()
        assert clean(tmp_path, results=False, inputs=()) == left
        removed = clean(tmp_path, results=True, inputs=[str(tmp_path / "rwkv-12.pth"), ""])
        assert set(removed) == set(results) - {"rwkv-12.pth"}
        assert {path.name for path in tmp_path.iterdir()} == {*others, "rwkv-12.pth"}


class TestPlaces:
    def places(self, folder: Path, said: list[str]) -> Places:
        return Places(folder, "run", said.append)

    @pytest.mark.parametrize("what", ["removed", "renamed", "a file"])
    def test_a_folder_that_is_gone(self, what: str, tmp_path: Path) -> None:
        said: list[str] = []
        folder = tmp_path / "out"
        folder.mkdir()
        places = self.places(folder, said)
        folder.rename(tmp_path / "renamed") if what == "renamed" else folder.rmdir()
        if what == "a file":
            folder.write_text("mine")
        path = places.save(lambda path: storage.save(path, ["x"]), "a.pth")
        assert path == tmp_path / "out-saved-run" / "a.pth"
        assert storage.load(path, "test") == ["x"]
        (message,) = said
        assert message.startswith(f"{folder / 'a.pth'} cannot be written: there is no folder {folder}")
        assert message.endswith(f"saved as {path}")

    def test_the_last_place_is_the_systems_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        said: list[str] = []
        places = self.places(tmp_path / "out", said)

        def write(path: Path) -> None:
            if path.parent.parent != tmp_path / "temporary":
                raise CheckpointError("full") from OSError(errno.ENOSPC, "full")
            path.touch()

        path = places.save(write, "a.pth")
        assert path == tmp_path / "temporary" / "out-saved-run" / "a.pth"
        assert not (tmp_path / "out-saved-run").exists()

    def test_nowhere(self, tmp_path: Path) -> None:
        def write(path: Path) -> None:
            raise CheckpointError(f"no room for {path.parent.name}") from OSError(errno.ENOSPC, "full")

        with pytest.raises(CheckpointError, match="no room for out; no room for out-saved-run; no room for"):
            self.places(tmp_path / "out", []).save(write, "a.pth")

    def test_what_is_wrong_with_the_content_is_no_matter_of_place(self, tmp_path: Path) -> None:
        tried: list[Path] = []

        def write(path: Path) -> None:
            tried.append(path)
            raise CheckpointError("not finite")

        with pytest.raises(CheckpointError, match="not finite"):
            self.places(tmp_path, []).save(write, "a.pth")
        assert tried == [tmp_path / "a.pth"]


class TestLines:
    def test_a_half_line_goes_and_whole_ones_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_text("one\ntwo\nthr")
        lines = LineFile(path, pytest.fail)
        lines.write("3\n")
        lines.close()
        lines.write("after its end\n")
        assert path.read_text() == "one\ntwo\n3\n"

    def test_what_does_not_fit_leaves_no_half_line(self, tmp_path: Path) -> None:
        script = (
            "import resource, sys; from pathlib import Path; from src.training.folder import LineFile\n"
            "lines = LineFile(Path(sys.argv[1]), print)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))\n"
            "for _ in range(4): lines.write('0123456789\\n')\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
            "lines.write('last\\n')"
        )
        path = tmp_path / "log"
        done = subprocess.run(
            [sys.executable, "-c", script, path], cwd=ROOT, check=True, capture_output=True, text=True
        )
        assert path.read_text() == "0123456789\n0123456789\nlast\n"
        assert done.stdout == f"{path} cannot be written (File too large); training goes on\n"
