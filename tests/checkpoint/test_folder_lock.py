"""A locked folder: one process at a time, whoever comes second is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from salalocal.checkpoint.folder_lock import only_one
from salalocal.errors import BusyError

_HOLD = "import sys, pathlib; from salalocal.checkpoint.folder_lock import only_one\n"
_HOLD += "with only_one(pathlib.Path(sys.argv[1]), 'holds it'): print('held', flush=True); sys.stdin.read()"


def test_a_second_one_is_told_what_the_first_does(tmp_path: Path) -> None:
    with (
        only_one(tmp_path, "counts it"),
        pytest.raises(BusyError, match="another process counts it"),
        only_one(tmp_path, "counts it"),
    ):
        raise AssertionError("two at once")
    with only_one(tmp_path, "counts it"):
        assert tmp_path.is_dir()


def test_the_end_of_a_process_unlocks(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError), only_one(tmp_path, "waits"):
            raise AssertionError("two at once")
        holder.kill()
    with only_one(tmp_path, "waits"):
        assert holder.returncode != 0
