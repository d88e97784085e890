"""The benchmark of small kernels: torch.compile is shared out whole, and gives what it stands for."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import small_kernels
from benchmarks.lightning_cases import results
from benchmarks.small_kernels import NUM_CASES, ROWS, as_floats, cases, compile_all, compile_share, new_weight


def test_every_case_is_in_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    def noted(case: Any) -> Callable[[], None]:
        asked.append((case.num_bytes, case.name))
        return lambda: None

    monkeypatch.setattr(small_kernels, "compiled", noted)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(small_kernels, "ROWS", (3, 1))
    for index in range(5):
        compile_share(index, 5)
    expected = [(case.num_bytes, case.name) for rows in (3, 1) for case in cases(rows, new_weight())]
    assert sorted(asked) == sorted(expected) and len(asked) == len(ROWS) * NUM_CASES


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a compiler on a CPU")
def test_a_form_is_compiled_for_its_own_case(seed: int) -> None:
    torch.manual_seed(seed)
    case = cases(2, new_weight())[2]
    assert torch.allclose(as_floats(small_kernels.compiled(case)()), as_floats(case.torch_form()), rtol=0.02, atol=0.02)


def test_what_is_late_is_told_and_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    script = tmp_path / "share.py"
    script.write_text("import sys, time\ntime.sleep(20 * sys.argv[-1].startswith('0/'))\n")
    monkeypatch.setattr(small_kernels, "__file__", str(script))
    monkeypatch.setattr(small_kernels.os, "cpu_count", lambda: 4)
    compile_all(2.0)
    assert results["torch.compile by all cores"]["exit_codes"] == ["late", 0]
