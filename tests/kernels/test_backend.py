"""The one dispatch rule, the stand-ins for Triton, and the interpreter's repairs that every kernel test leans on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from salalocal.errors import BackendError
from salalocal.kernels import backend
from salalocal.kernels.backend import tl, triton, use_triton


@triton.jit
def _bfloat_kernel(a_ptr: Any, b_ptr: Any, y_ptr: Any, size: tl.constexpr) -> None:
    index = tl.arange(0, size)
    square = index[:, None] * size + index[None, :]
    a, b = tl.load(a_ptr + square), tl.load(b_ptr + square)
    product = tl.dot(a, b).to(tl.bfloat16)
    tl.store(y_ptr + square, tl.where(a > b, product + a, product * b))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
def test_interpreter_computes_in_bfloat16(seed: int) -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    y = torch.full_like(a, float("nan"))
    _bfloat_kernel[(1,)](a, b, y, size=16)
    product = (a.float() @ b.float()).bfloat16()
    torch.testing.assert_close(y, torch.where(a > b, product + a, product * b), rtol=2**-6, atol=2**-6)


def test_a_cpu_never_takes_the_kernels() -> None:
    assert not use_triton(torch.zeros(1))


@pytest.mark.parametrize(("value", "wanted"), [("", False), ("triton", False), ("reference", True)])
def test_variable_turns_kernels_off(value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.KERNELS_VARIABLE, value)
    assert backend._wants_reference.__wrapped__() is wanted


def test_unknown_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.KERNELS_VARIABLE, "off")
    with pytest.raises(BackendError, match="'off' is not known"):
        backend._wants_reference.__wrapped__()


def test_kernel_files_can_be_imported_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, salalocal.kernels as room\n"
        "names = [module.name for module in pkgutil.walk_packages(room.__path__, 'salalocal.kernels.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "from salalocal.kernels.backend import HAS_TRITON\n"
        "assert not HAS_TRITON and len(names) > 10"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMPILING = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from salalocal.kernels.backend import on_first_compile

@triton.jit
def kernel(x_ptr, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    tl.store(at, tl.load(at) + 1)

notices = []
on_first_compile(lambda: notices.append(None))
for size in SIZES:
    source = ASTSource(kernel, {"x_ptr": "*fp32", "SIZE": "constexpr"}, {"SIZE": size})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(len(notices))
"""


@pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")
def test_the_first_compilation_is_noticed_once_and_a_cached_kernel_is_not(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    for sizes, expected in (((32, 64), "1"), ((32, 64), "0"), ((64, 128), "1")):
        script = tmp_path / "compiling.py"  # a kernel's source is read from its file
        script.write_text(COMPILING.replace("SIZES", repr(sizes)))
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == expected
