"""What the steps before preference training load: no training framework."""

import os
import subprocess
import sys
from pathlib import Path

from factories import tiny_checkpoint
from running import ROOT

RUN_ALL = """
import runpy, sys
_, root, *lines = sys.argv
for line in lines:
    sys.argv = line.split()
    try:
        runpy.run_path(f"{root}/{sys.argv[0]}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, line
frameworks = ("pytorch_lightning", "lightning_fabric", "deepspeed", "src.training")
print("loaded", [name for name in frameworks if name in sys.modules], "torch" in sys.modules)
"""


def test_neither_lightning_nor_deepspeed_is_loaded(tmp_path: Path) -> None:
    """By rejects from a model and pairs with its log-probabilities, in a process of their own."""
    tiny_checkpoint(tmp_path / "base.pth")
    (tmp_path / "in.csv").write_text("prompt,chosen,reject\nWhat?,One,\nAnd?,Two,\n", encoding="utf-8")
    model = "--load_model base.pth --accelerator cpu"
    rejects, pairs = "rlhf_generate_reject.py", "PrepareOrpoDataset.py"
    lines = [
        f"{pairs} -h",
        f"{rejects} -h",
        f"{rejects} {model} --input_csv in.csv --output_csv full.csv --max_tokens 3",
        f"{pairs} {model} --input_csv full.csv --output_save out.save --target_pair_count 2 --base_logp 1",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(ROOT), *lines],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded [] True"
    assert {"full.csv", "out.save"} <= {path.name for path in tmp_path.iterdir()}
