"""What DeepSpeed's Adam for the host takes to be built, and how it is said that it cannot be."""

from __future__ import annotations

import importlib.machinery
import inspect
import os
import shutil
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.config import TrainConfig
from src.errors import ConfigError, KernelError
from src.training import host_adam
from src.training.host_adam import make_host_adam, missing_tools, require_host_adam
from src.training.optimizers import check_optimizer

STRATEGY = "deepspeed_stage_2_offload"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of PATH, with everything that a build takes; DeepSpeed has not come with its Adam built."""
    for name in ("c++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(host_adam, "find_spec", lambda name: None)
    return tmp_path


class TestMissing:
    def test_nothing_is(self, tools: Path) -> None:
        assert missing_tools() == []
        require_host_adam(STRATEGY)

    @pytest.mark.parametrize(
        ("absent", "said"),
        [
            (["c++"], r"no C\+\+ compiler \(c\+\+\): install"),
            (["ninja"], r"no ninja on PATH: install"),
            (["Python.h"], r"no /.*/Python.h: install"),
            (["c++", "ninja"], r"no C\+\+ compiler \(c\+\+\) and no ninja on PATH: install"),
        ],
    )
    def test_it_is_said_what(self, tools: Path, absent: list[str], said: str) -> None:
        for name in absent:
            (tools / name).unlink()
        config = TrainConfig.from_flags({"load_model": "base.pth", "data_file": "data", "strategy": STRATEGY})
        with pytest.raises(ConfigError, match=said) as refused:
            check_optimizer(config, on_gpu=True)
        assert "or use deepspeed_stage_2, with --optim paged_adamw8bit" in str(refused.value)
        assert "\n" not in str(refused.value)
        check_optimizer(config, on_gpu=False)

    @pytest.mark.parametrize(
        ("command", "there", "said"),
        [
            ("g++-14", ["g++-14"], ""),
            ("g++-14", [], "g++-14"),
            ("g++-14 -m64", ["g++-14"], ""),
            ("g++-14 -m64", [], "g++-14 in CXX='g++-14 -m64'"),
            ("ccache g++-14 -m64", ["ccache", "g++-14"], ""),
            ("ccache g++-14", ["ccache"], "g++-14 in CXX='ccache g++-14'"),
            ("ccache g++-14", ["g++-14"], "ccache in CXX='ccache g++-14'"),
            ("ccache g++-14", [], "ccache, g++-14 in CXX='ccache g++-14'"),
            ("CCACHE_DIR=/x ccache g++-14", ["ccache", "g++-14"], ""),
            ("", [], "CXX is ''"),
            ("-m64", [], "CXX is '-m64'"),
            ('g++-14 "', ["g++-14"], "CXX is 'g++-14 \"'"),
        ],
    )
    @pytest.mark.parametrize("quoted", [False, True])
    def test_the_compiler_is_the_one_named(
        self, quoted: bool, command: str, there: list[str], said: str, tools: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All programs of the command, where torch takes several; one of several words where it takes one."""
        monkeypatch.setattr(host_adam, "_takes_one_program", lambda: quoted)
        for name in there:
            shutil.copy(tools / "c++", tools / name)
        monkeypatch.setenv("CXX", command)
        if quoted and " " in command and not said.startswith("CXX is"):
            said = f"torch {torch.__version__} takes one program from CXX, not {command!r}; it uses ccache by itself"
        assert missing_tools() == ([f"no C++ compiler ({said})"] if said else [])

    def test_a_program_whose_name_has_a_space(self, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(host_adam, "_takes_one_program", lambda: True)
        shutil.copy(tools / "c++", tools / "my g++")
        monkeypatch.setenv("CXX", str(tools / "my g++"))
        assert missing_tools() == []

    @pytest.mark.parametrize(("accelerator", "built"), [("cuda", True), ("cuda", False), ("cpu", True)])
    def test_one_that_came_built_needs_none(
        self, tools: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, built: bool
    ) -> None:
        record = f"installed_ops={{'cpu_adam': {built}}}\naccelerator_name={accelerator!r}\n"
        (tools / "git_version_info_installed.py").write_text(record)
        found = importlib.machinery.ModuleSpec("deepspeed", None, origin=str(tools / "__init__.py"))
        monkeypatch.setattr(host_adam, "find_spec", lambda name: found)
        (tools / "ninja").unlink()
        assert bool(missing_tools()) == (accelerator != "cuda" or not built)


def test_deepspeeds_record_is_where_it_is_read() -> None:
    """The file that `missing_tools` reads says what the package itself says."""
    pytest.importorskip("deepspeed")
    from deepspeed.git_version_info import accelerator_name, installed_ops

    assert host_adam._came_built() == (accelerator_name == "cuda" and installed_ops["cpu_adam"])


def test_torch_takes_a_compiler_as_it_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what it writes for ninja."""
    from torch.utils import cpp_extension

    write: Any = cpp_extension._write_ninja_file
    given: dict[str, Any] = dict.fromkeys(inspect.signature(write).parameters, ())
    given |= {name: [] for name in given if name.endswith("flags")}
    written = tmp_path / "build.ninja"
    given |= {"path": str(written), "sources": ["a.cpp"], "objects": ["a.o"], "library_target": "a.so"}
    monkeypatch.setenv("CXX", "ccache c++ -m64")
    write(**given)
    (line,) = (line for line in written.read_text().splitlines() if line.startswith("cxx = "))
    assert line.endswith("'ccache c++ -m64'" if host_adam._takes_one_program() else "= ccache c++ -m64")


@pytest.mark.slow
def test_a_build_that_fails_says_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that has a version and compiles nothing."""
    builder: Any = pytest.importorskip("deepspeed.ops.op_builder.builder")
    if missing_tools():
        pytest.skip(f"here is {' and '.join(missing_tools())}")
    error = "simd.h:9:10: fatal error: cpuid.h: No such file or directory"
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo \'{error}\'; exit 1;; *) echo 14.0.0;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    with pytest.raises(KernelError, match="could not build its Adam for the host") as refused:
        make_host_adam([{"params": [torch.nn.Parameter(torch.zeros(2))]}], STRATEGY, lr=0.1)
    assert f"--strategy {STRATEGY} steps ({error})" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "DeepSpeed compiles its Adam for the host: one or two minutes" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "built"))
    with pytest.raises(KernelError, match="Not a directory") as refused:
        make_host_adam([{"params": [torch.nn.Parameter(torch.zeros(2))]}], STRATEGY, lr=0.1)
    assert f"{tmp_path / 'file' / 'built'} can be written to" in str(refused.value)


@pytest.mark.parametrize(("age", "built", "waits"), [(0, False, 1), (600, False, 2), (600, True, 1), (None, True, 0)])
def test_it_is_said_why_the_first_use_takes_long(
    age: int | None, built: bool, waits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of a build that was killed stays, and torch waits for it without a word; not for another Python's."""
    monkeypatch.setattr(host_adam, "find_spec", lambda name: None)
    folder = tmp_path / "py311_cu130" / "cpu_adam"
    folder.mkdir(parents=True)
    other = tmp_path / "py310_cu121" / "cpu_adam"
    other.mkdir(parents=True)
    for name in ("lock", "cpu_adam.so"):
        (other / name).touch()
        os.utime(other / name, (0, 0))
    if built:
        (folder / "cpu_adam.so").touch()
    if age is not None:
        (folder / "lock").touch()
        os.utime(folder / "lock", (time.time() - age,) * 2)
    said = list(host_adam._waits(folder))
    assert len(said) == waits
    assert [f"remove {folder / 'lock'}" in line for line in said[:1]] == [age == 600] * min(waits, 1)
    assert any("one or two minutes" in line for line in said) == (not built)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Error building x: [1/2] c++ a\nFAILED: a.o\nc++ a\n/bin/sh: 1: c++: not found\nninja: build stopped: x.\n",
         "/bin/sh: 1: c++: not found"),
        ("Unable to JIT load the cpu_adam op due to ninja not being installed.",
         "Unable to JIT load the cpu_adam op due to ninja not being installed."),
        ("/x/cpu_adam.so: undefined symbol: f", "/x/cpu_adam.so: undefined symbol: f"),
        ("", "it does not say why"),
    ],
)  # fmt: skip
def test_the_line_that_says_why(said: str, reason: str) -> None:
    assert host_adam._reason(said) == reason


def test_options_reach_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed: Any = pytest.importorskip("deepspeed.ops.adam")
    given: list[Any] = []
    monkeypatch.setattr(deepspeed, "DeepSpeedCPUAdam", lambda *a, **k: given.append((a, k)) or SimpleNamespace())
    make_host_adam([], STRATEGY, lr=0.5, adamw_mode=False)
    assert given == [(([],), {"lr": 0.5, "adamw_mode": False})]
