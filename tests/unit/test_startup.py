"""A start's imports: what is left out of them, and where their bytecode is kept."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.startup import quick_imports

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "merge_state", "PrepareOrpoDataset", "rlhf_generate_reject")


def test_collection_rests_and_goes_on() -> None:
    assert gc.isenabled()
    with quick_imports(first=False):
        assert not gc.isenabled()
        with quick_imports(first=False):
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("module", ["src.commands.chat", "src.commands.state", "src.commands.binidx"])
def test_a_module_that_is_started_as_a_file_says_how_it_is_started(module: str, tmp_path: Path) -> None:
    file = REPOSITORY / f"{module.replace('.', '/')}.py"
    alone = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, file], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == f"error: a module is started by name, python -m {module}, in the folder of train.py\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in which a process works stays there")
@pytest.mark.parametrize(
    "words",
    [
        *([str(REPOSITORY / f"{name}.py")] for name in SCRIPTS),
        *(["-m", f"src.commands.{name}"] for name in ("chat", "binidx")),
        ["-m", "src.commands.state", "inspect"],
    ],
    ids=lambda words: Path(words[-1]).name,
)
def test_a_folder_that_is_gone_is_said(words: list[str], tmp_path: Path) -> None:
    """Whatever the flags; `-h` needs none."""
    gone = tmp_path / "gone"
    enter = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    for more, code in ([], 2), (["-h"], 0):
        command = ["sh", "-c", enter, str(gone), sys.executable, *words, *more]
        own = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        ended = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code, ended.stderr
        assert ended.stderr.count("\n") == bool(code)
        assert not code or ended.stderr.startswith("error: the folder in which this was started has been removed")


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder of libraries without bytecode, in which torch takes no time to import."""
    package = tmp_path / "libraries" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("value = 1\n")
    (package.parent / "torch-1.0.dist-info").mkdir()
    return package.parent


def start(libraries: Path, cache: Path, **variables: str) -> list[str]:
    """What a program then has as (folder of bytecode, whether it writes none)."""
    code = "import sys; from src.startup import keep_bytecode; keep_bytecode(); import torch; "
    code += "print(sys.pycache_prefix, sys.dont_write_bytecode)"
    own = {**os.environ, "PYTHONPATH": f"{libraries}{os.pathsep}{REPOSITORY}", "XDG_CACHE_HOME": str(cache)}
    own.pop("PYTHONPYCACHEPREFIX", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**own, **variables}, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.split()


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/bytecode/*/**/torch/__init__.*.pyc"))


def test_bytecode_is_kept_where_python_keeps_none(libraries: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder, writes_none = start(libraries, cache, PYTHONDONTWRITEBYTECODE="1")
    assert (Path(folder).parents[1].parent, writes_none) == (cache, "False")
    assert len(kept(cache)) == 1
    assert not (libraries / "torch" / "__pycache__").exists()
    (libraries / "torch-1.0.dist-info").rename(libraries / "torch-1.1.dist-info")
    assert start(libraries, cache, PYTHONDONTWRITEBYTECODE="1")[0] != folder  # no bytecode of another version is read
    for version in range(3):
        (libraries / f"other-{version}.dist-info").mkdir()
        start(libraries, cache, PYTHONDONTWRITEBYTECODE="1")
    assert len(kept(cache)) == 2


def test_python_keeps_its_own_where_it_can(libraries: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert start(libraries, cache, PYTHONDONTWRITEBYTECODE="") == ["None", "False"]
    assert (libraries / "torch" / "__pycache__").exists()
    assert start(libraries, cache, PYTHONDONTWRITEBYTECODE="1") == ["None", "True"]  # there is some now
    assert not kept(cache)


@pytest.mark.parametrize("obstacle", ["named by the user", "no home", "a file is in its place"])
def test_it_never_fails(obstacle: str, libraries: Path, tmp_path: Path) -> None:
    variables = {"PYTHONDONTWRITEBYTECODE": "1"}
    expected = ["None", "True"]
    if obstacle == "named by the user":
        variables["PYTHONPYCACHEPREFIX"] = str(tmp_path / "own")
        expected = [str(tmp_path / "own"), "True"]
    elif obstacle == "no home":
        variables |= {"XDG_CACHE_HOME": "relative"}
    else:
        (tmp_path / "cache").write_text("")
    assert start(libraries, tmp_path / "cache", **variables) == expected


@pytest.mark.slow
def test_bitsandbytes_brings_no_code_generator() -> None:
    code = """
import os, sys
import torch
from src.model.shape import ModelShape
from src.quant import DequantizationWorkspace, FrozenLinear
weight = torch.randn(64, 64)
FrozenLinear.from_weight(weight, "nf4", torch.float32, workspace=DequantizationWorkspace()).dequantized()
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item() == 1
"""
    variables = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=variables, check=True)
