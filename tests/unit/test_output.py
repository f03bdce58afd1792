"""Scripts whose standard streams are closed, full or of a small encoding, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from src.output import LastingStream, lasting_output, several

PRINTS = "from src.output import lasting_output\nwith lasting_output():\n    for _ in range(3): print('x' * 9000)\n"


def test_a_reader_that_died_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
    )
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == "warning: <stdout> cannot be written (Broken pipe); going on without it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("redirections", [">/dev/full", ">/dev/full 2>/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_full_and_closed_output_are_no_errors(redirections: str) -> None:
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" {redirections}', PRINTS], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_a_file_opened_later_does_not_get_what_is_printed(tmp_path: Path) -> None:
    """A closed descriptor would be the next file's."""
    script = (
        f"import os\n{PRINTS}    file = open({str(tmp_path / 'file')!r}, 'w')\n    os.write(1, b'x'); os.write(2, b'x')"
    )
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" >&- 2>&-', script], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_it_is_put_back_and_otherwise_the_stream_itself(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with lasting_output():
        print("said")
        assert isinstance(sys.stdout, LastingStream)
        assert sys.stdout.encoding == before.encoding
    assert sys.stdout is before
    assert capsys.readouterr().out == "said\n"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `PYTHON SCRIPT ...` as a shell would, with the script's folder put before it."""
    return subprocess.run(
        ["sh", "-c", f"{sys.executable} {ROOT}/{command}"],
        cwd=folder,
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("train.py -h >/dev/full", 0, b"warning: <stdout> cannot be written (No space left on device)"),
        ("train.py -h >&-", 0, b""),
        ("merge_state.py -h 2>&-", 0, b""),
        ("train.py --lr 1 2>/dev/full", 2, b""),
        ("train.py --lr 1 2>&-", 2, b""),
        ("train.py --lr 1 <&-", 2, b"error: unknown flag --lr: use --lr_init"),
        ("merge_state.py a b <&- >&- 2>&-", 2, b""),
    ],
)
def test_nobody_has_to_listen(command: str, code: int, err: bytes, tmp_path: Path) -> None:
    ended = shell(command, tmp_path)
    assert ended.returncode == code
    assert ended.stderr.startswith(err)
    assert ended.stderr.count(b"\n") == bool(err)


def test_what_the_encoding_lacks_is_written_as_escapes(tmp_path: Path) -> None:
    ended = shell(
        "PrepareOrpoDataset.py --input_csv p\u00e4rchen.csv --output_save x.save", tmp_path, PYTHONIOENCODING="ascii"
    )
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.startswith(b"error: p\\xe4rchen.csv does not exist")


def test_so_many_of_something() -> None:
    assert [several(1, "entry"), several(1200, "entry"), several(1, "file"), several(0, "file")] == [
        "1 entry", "1,200 entries", "1 file", "0 files",
    ]  # fmt: skip
