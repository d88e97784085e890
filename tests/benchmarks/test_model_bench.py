"""The script that benches the whole model in parts: a part that fails or is cut is told, and the next one runs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_bench.sh"
# Stands for `python -m salalocal bench`: one part works, one fails, one is cut and shows what it has.
FAKE = f"""#!/usr/bin/env bash
case "$*" in
-*salalocal*dense*) echo '{{"tests": [{{"avg_ts": 1.0}}, {{"avg_ts": 2.0}}, {{"error": "no memory"}}]}}' ;;
*salalocal*cap*) echo "error: no card" >&2; exit 6 ;;
*salalocal*bf16*) trap 'echo "{{\\"tests\\": [{{\\"avg_ts\\": 3.0}}]}}"; exit 130' INT; sleep 30 & wait ;;
*salalocal*) exit 0 ;;
*) exec {sys.executable} "$@" ;;
esac
"""


def parts(folder: Path, *names: str) -> tuple[int, dict[str, list[str]], str]:
    """Exit code, what parts.tsv says of every part, and what was printed."""
    fake = folder / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out = folder / "out"
    done = subprocess.run(
        ["bash", SCRIPT, out, *names],
        env={"PYTHON": str(fake), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    lines = (out / "parts.tsv").read_text().splitlines() if (out / "parts.tsv").exists() else []
    return done.returncode, {line.split("\t")[0]: line.split("\t")[1:] for line in lines}, done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_part_that_fails_never_stops_the_next(tmp_path: Path) -> None:
    code, told, printed = parts(tmp_path, "cap8", "nonsense", "bf16=1", "int8", "dense")
    assert list(told) == ["cap8", "bf16", "int8", "dense"]
    assert (told["cap8"][0], told["cap8"][2]) == ("6", "0") and "error: no card" in printed
    assert (told["bf16"][0], told["bf16"][2]) == ("124", "1"), "what was measured before the cut is lost"
    assert (told["int8"][0], told["int8"][2]) == ("0", "0")
    assert (told["dense"][0], told["dense"][2]) == ("0", "2")
    assert code == 1 and "unknown part nonsense" in printed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_all_is_well_if_every_part_measured_something(tmp_path: Path) -> None:
    code, told, printed = parts(tmp_path, "warm=5", "dense=20")
    assert code == 0 and list(told) == ["dense"] and "warm:" in printed
    assert (tmp_path / "out" / "dense.json").exists() and (tmp_path / "out" / "warm-4.log").exists()
