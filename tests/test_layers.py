"""The house rules: imports point downward, and each outside library has one door."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENTRY_SCRIPTS = ("train.py", "merge_state.py", "PrepareOrpoDataset.py", "rlhf_generate_reject.py")

LEVELS = (
    ("src.output", "src.startup", "src.system"),
    ("src.errors",),
    ("src.archive", "src.compression"),
    (
        *("src.config", "src.tokenizer", "src.losses", "src.schedule", "src.layout", "src.identity"),
        *("src.storage", "src.streaming", "src.safetensors", "src.cutting", "src.scratch"),
    ),
    ("src.data", "src.ops"),
    ("src.quant",),
    ("src.model",),
    ("src.adapters", "src.checkpoint", "src.generate", "src.device"),
    ("src.loading", "src.merge", "src.export", "src.inspection"),
    ("src.tuned", "src.cli"),
    ("src.training",),
    ("src.commands", "src.demo"),
)
"""Rooms from the ground up: a module or a package. A file imports its own room and lower levels."""

SIDEWAYS = {
    ("src.adapters", "src.checkpoint"),
    ("src.startup", "src.system"),
    ("src.storage", "src.identity"),
    ("src.cutting", "src.layout"),
    ("src.streaming", "src.storage"),
    ("src.safetensors", "src.identity"),
    ("src.safetensors", "src.storage"),
    ("src.safetensors", "src.streaming"),
}
"""Imports within a level that are wanted: (who, whom)."""

ONE_DOOR = {
    "argparse": ("src.cli",),
    "bitsandbytes": ("src.quant", "src.training.optimizers"),
    "pyrwkv_tokenizer": ("src.tokenizer",),
    "pyarrow": ("src.data.containers",),
    "pytorch_lightning": ("src.training",),
    "wandb": ("src.training",),
    "matplotlib": ("src.training.plots",),
    "deepspeed": ("src.training",),
    "zstandard": ("src.compression",),
    "tqdm": ("src.loading", "src.training", "src.commands", *ENTRY_SCRIPTS),
}
"""Outside libraries and the only rooms that may import them."""

ONE_CALLER = {
    "torch.load": "src.storage",
    "torch.save": "src.storage",
    "os.replace": "src.storage",
    "os.rename": "src.storage",
}
"""Functions and the only module that may call them: it opens files in one safe way, and writes them whole."""

POSIX_ONLY = re.compile(
    r"os\.(p?read|p?write)v|os\.pread|os\.pwrite|os\.posix_\w+|os\.sysconf|os\.fork\w*|os\.get[eu]?[ug]id|os\.mkfifo"
    r"|os\.(kill|get|set)pg\w*|os\.setsid|os\.(f?chown|fchmod|statvfs|uname|getloadavg|sync|sched_\w+|O_NONBLOCK)"
    r"|signal\.(SIG(HUP|USR\d|KILL|ALRM|CHLD|PIPE|QUIT|STOP|CONT)|alarm|pause|pthread_\w+|setitimer)"
)
POSIX_MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix", "msvcrt", "winreg")
"""What Windows has not, or nothing else has: `src.system` alone has it, each with an alternative."""

CLOSED_TO_TRAINING = (
    "src.quant",
    "src.ops.wkv6",
    "src.ops.wkv6_cuda",
    "src.ops.dequantize_cuda",
    "src.ops.wkv6_chunked",
    "src.ops.wkv6_reference",
    "src.ops.wkv7",
    "src.ops.wkv7_cuda",
    "src.ops.wkv7_chunked",
    "src.ops.wkv7_reference",
)
"""What training asks the model for instead of importing it."""

ARCHITECTURE_KEY = re.compile(
    r"\b(time_(maa|mix_w|mix_x|decay|faaaa)\w*|ln_x|x_[rwkvag]|(att\.)?[wavg][0-2]|k_k|k_a|r_k)\b"
)
"""How an architecture's own tensors are called; `time_state` is every architecture's."""
ARCHITECTURES = ("src.model.rwkv6", "src.model.rwkv7")

ENVIRONMENT_READERS = ("src.device", "src.startup", "src.system", "src.training.host_adam")
"""Who may look at the environment: what launchers and compilers say of the place, never a setting."""


def sources() -> list[Path]:
    """Every Python file of the product."""
    scripts = [ROOT / name for name in ENTRY_SCRIPTS if (ROOT / name).exists()]
    return scripts + sorted((ROOT / "src").rglob("*.py"))


def module_name(path: Path) -> str:
    """`src.data.binidx` for a file below src, `train.py` for an entry script."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if len(parts) == 1:
        return path.name
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, those inside functions included."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = ".".join([*base, alias.name])
                is_module = (ROOT / Path(*full.split("."))).with_suffix(".py").exists()
                yield node.lineno, full if is_module else ".".join(base)


def belongs(module: str, room: str) -> bool:
    """Whether a module is the room or inside it."""
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> tuple[int, str]:
    """(level, room) of a module; entry scripts live above all levels."""
    if module in ENTRY_SCRIPTS:
        return len(LEVELS), module
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if belongs(module, room):
                return level, room
    raise AssertionError(f"{module} has no room: give it one in LEVELS")


def dotted(node: ast.expr) -> str:
    """`os.environ.get` for such an expression, "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value)
        return f"{prefix}.{node.attr}" if prefix else ""
    return ""


def level_violations(path: Path) -> list[str]:
    """Imports of a file that do not point downward."""
    module = module_name(path)
    if module == "src":
        return []
    level, room = room_of(module)
    found = []
    for line, target in imported_modules(path):
        if not target.startswith("src."):
            continue
        target_level, target_room = room_of(target)
        if room != target_room and target_level >= level and (room, target_room) not in SIDEWAYS:
            found.append(f"{path.relative_to(ROOT)}:{line} ({room}) imports {target}")
    return found


def door_violations(path: Path) -> list[str]:
    """Imports of a library outside its rooms."""
    module = module_name(path)
    return [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for line, target in imported_modules(path)
        for library, rooms in ONE_DOOR.items()
        if belongs(target, library) and not any(belongs(module, room) for room in rooms)
    ]


def caller_violations(path: Path) -> list[str]:
    """Uses of a function outside the module that may call it, by attribute or by import."""
    module = module_name(path)
    found = []
    for node in ast.walk(tree_of(path)):
        names = [dotted(node)] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [
            f"{path.relative_to(ROOT)}:{node.lineno} uses {name}"
            for name in names
            if ONE_CALLER.get(name, module) != module
        ]
    return found


def training_violations(path: Path) -> list[str]:
    """Imports of the quantised linear or an operator by training."""
    if not belongs(module_name(path), "src.training"):
        return []
    return [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for line, target in imported_modules(path)
        if target in CLOSED_TO_TRAINING
    ]


def key_violations(path: Path) -> list[str]:
    """Names of an architecture's tensors in code outside of its file; docstrings and helps may mention them."""
    module = module_name(path)
    if module in ARCHITECTURES or belongs(module, "src.config") or belongs(module, "src.demo"):
        return []
    tree = tree_of(path)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    found = []
    for node in ast.walk(tree):
        text = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
        if isinstance(text, str) and id(node) not in said and ARCHITECTURE_KEY.search(text):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} names {text}")
    return found


def environment_reads(path: Path) -> list[str]:
    """Reads of environment variables outside the files that may."""
    if module_name(path) in ENVIRONMENT_READERS:
        return []
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and dotted(node.func) in ("os.getenv", "os.environ.get"):
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and dotted(node.value) == "os.environ" and isinstance(node.ctx, ast.Load):
            key = node.slice
        else:
            continue
        found.append(f"{path.relative_to(ROOT)}:{node.lineno} reads {ast.unparse(key)}")
    return found


def posix_violations(path: Path, allowed: str = "src.system") -> list[str]:
    """Calls, names and modules that a system lacks, in a file that is not the one that may have them."""
    if module_name(path) == allowed:
        return []
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for line, target in imported_modules(path)
        if target in POSIX_MODULES
    ]
    for node in ast.walk(tree_of(path)):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name and POSIX_ONLY.fullmatch(name):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {name}")
    return found


def test_imports_point_downward() -> None:
    assert [violation for path in sources() for violation in level_violations(path)] == []


def test_each_library_has_one_door() -> None:
    assert [violation for path in sources() for violation in door_violations(path)] == []


def test_training_knows_neither_packing_nor_operators() -> None:
    assert [violation for path in sources() for violation in training_violations(path)] == []


def test_each_architecture_alone_names_its_keys() -> None:
    assert [violation for path in sources() for violation in key_violations(path)] == []
    assert all(
        ARCHITECTURE_KEY.search((ROOT / Path(*name.split("."))).with_suffix(".py").read_text("utf-8"))
        for name in ARCHITECTURES
    )


def test_configuration_needs_no_torch() -> None:
    light = [ROOT / "src" / name for name in ("errors.py", "cli.py", "schedule.py", "tokenizer.py")]
    light += (ROOT / "src" / "config").glob("*.py")
    heavy = [(path.name, target) for path in light for _, target in imported_modules(path) if belongs(target, "torch")]
    assert heavy == []


def test_each_function_has_one_caller() -> None:
    assert [violation for path in sources() for violation in caller_violations(path)] == []


def test_what_one_system_lacks_is_called_in_one_place() -> None:
    assert [violation for path in sources() for violation in posix_violations(path)] == []
    assert posix_violations(ROOT / "src" / "system.py", allowed="")


def test_torch_load_is_always_weights_only() -> None:
    calls = [
        node
        for node in ast.walk(tree_of(ROOT / "src" / "storage.py"))
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        assert isinstance(options.get("weights_only"), ast.Constant), ast.unparse(call)
        assert options["weights_only"].value is True, ast.unparse(call)  # type: ignore[attr-defined]


def test_no_setting_comes_from_the_environment() -> None:
    assert [violation for path in sources() for violation in environment_reads(path)] == []


def test_every_room_of_the_plan_is_checked() -> None:
    rooms = {room_of(module_name(path))[1] for path in sources() if module_name(path) != "src"}
    assert {
        "src.errors",
        "src.storage",
        "src.config",
        "src.ops",
        "src.model",
        "src.checkpoint",
        "src.device",
        "src.training",
        "src.commands",
        "src.cli",
    } <= rooms


def test_the_demonstrations_folder_holds_what_they_read_and_how_it_was_made() -> None:
    assert {path.name for path in (ROOT / "src" / "demo").glob("*.py")} == {"make_data.py", "make_start.py"}


def test_the_checks_see_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    culprit = tmp_path / "src" / "ops" / "culprit.py"
    culprit.parent.mkdir(parents=True)
    culprit.write_text(
        "def f():\n    from ..training import run\n    import wandb.sdk\n    return os.environ['RWKV_CTXLEN']\n"
        "from torch import save\nos.replace(f(), save)\n'time_decay_w1'\nmodel.time_maa_x + 'ffn.time_maa_k'\n"
        "model.w0 + 'blocks.0.att.r_k'\n",
        encoding="utf-8",
    )
    (tmp_path / "src" / "training").mkdir()
    (tmp_path / "src" / "training" / "run.py").touch()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert level_violations(culprit) == ["src/ops/culprit.py:2 (src.ops) imports src.training.run"]
    assert door_violations(culprit) == ["src/ops/culprit.py:3 imports wandb.sdk"]
    assert key_violations(culprit) == [
        "src/ops/culprit.py:8 names time_maa_x",
        "src/ops/culprit.py:8 names ffn.time_maa_k",
        "src/ops/culprit.py:9 names w0",
        "src/ops/culprit.py:9 names blocks.0.att.r_k",
    ]
    trainer = tmp_path / "src" / "training" / "run.py"
    trainer.write_text("from src.quant import FrozenLinear\n", encoding="utf-8")
    assert training_violations(trainer) == ["src/training/run.py:1 imports src.quant"]
    assert environment_reads(culprit) == ["src/ops/culprit.py:4 reads 'RWKV_CTXLEN'"]
    assert sorted(caller_violations(culprit)) == [
        "src/ops/culprit.py:5 uses torch.save",
        "src/ops/culprit.py:6 uses os.replace",
    ]
