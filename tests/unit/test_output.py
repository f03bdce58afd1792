"""Output that nobody reads any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

from src.output import LastingStream, lasting_output

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
