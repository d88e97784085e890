"""Every kernel configuration that ships compiles for the cards we name, within their shared memory, without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CONFIGURATIONS = sorted((TESTS / "kernels" / "configurations").glob("*.py"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_fit_every_card(path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "compile_case.py"), str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    assert compiled, "no configuration listed"
    problems = [f"{one['name']} sm_{one['architecture']}: {one['problem']}" for one in compiled if one["problem"]]
    assert not problems, "\n".join(problems)
