"""Compiles Triton kernels for cards that are not here and reads off what they need: shared memory, registers, spills.

A file in tests/kernels/configurations lists as CASES every configuration that ships; test_kernel_limits.py compiles
them in a process of its own, since the interpreter's switch is read once. By hand:

    python tests/compile_case.py tests/kernels/configurations/NAME.py [--json]
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # that one block may use


@dataclass(frozen=True)
class CompileCase:
    """One launch configuration.

    `types`: by argument, such as "*bf16", "*i32", "i32", "fp32", or "tensordesc<...>"; `constants`: constexprs and
    arguments that launch as None or 1. `divisible`: arguments that are multiples of 16 (aligned pointers, strides):
    without it loads are narrow and the figures mean nothing. `max_registers`: what a thread is held to by its launch.
    `max_spill_bytes`: stores, that are known and measured.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES
    max_spill_bytes: int = 0
    max_registers: int | None = None


@dataclass
class Compiled:
    """What a configuration needs on one architecture. Units: bytes."""

    name: str
    architecture: int
    shared_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    max_spill_bytes: int = 0
    error: str = ""
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """What is wrong with it, in words; empty if nothing is."""
        if self.error:
            return self.error
        if self.shared_bytes > SHARED_KIB[self.architecture] * 1024:
            return f"{self.shared_bytes / 1024:.1f} KiB of shared memory, {SHARED_KIB[self.architecture]} are there"
        if self.spill_bytes > self.max_spill_bytes:
            return f"{self.spill_bytes} bytes of spills, {self.max_spill_bytes} are known"
        return ""


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    """Compile for one architecture; no driver and no card is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in case.constants else case.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.max_registers}
    compiled = Compiled(case.name, architecture, max_spill_bytes=case.max_spill_bytes)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the result
        compiled.error = f"{type(error).__name__}: {error}"[:400]
        return compiled
    compiled.shared_bytes = built.metadata.shared
    _read_resources(compiled, built.asm["ptx"], case.max_registers)
    return compiled


def _read_resources(compiled: Compiled, ptx: str, max_registers: int | None) -> None:
    """Registers and spills are told by ptxas alone, so it is run once more."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(compiled.architecture).path, "-v", f"--gpu-name={target[1]}", path, "-o", f"{path}.cubin"]
        command += [f"--maxrregcount={max_registers}"] if max_registers else []
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None
    compiled.registers = int(registers[1])
    compiled.spill_bytes = int(spills[1]) if spills else 0
    for name in re.findall(r"\b(wgmma\.mma_async|mma\.sync|cp\.async\.bulk|cp\.async|ldmatrix|dp4a)", ptx):
        compiled.instructions[name] = compiled.instructions.get(name, 0) + 1


def compile_all(cases: list[CompileCase]) -> list[Compiled]:
    """Every case for each of its architectures."""
    jobs = [(case, architecture) for case in cases for architecture in case.architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_case(*job), jobs))


def load_cases(path: Path) -> list[CompileCase]:
    """CASES of a configuration file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("compile_case", sys.modules[__name__])
    spec.loader.exec_module(module)
    return list(module.CASES)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET")
    compiled = compile_all(load_cases(arguments.path))
    if arguments.json:
        print(json.dumps([asdict(one) | {"problem": one.problem} for one in compiled]))
        return 0
    for one in compiled:
        needs = f"{one.shared_bytes / 1024:6.1f} KiB {one.registers:4d} registers {one.spill_bytes:5d} B spilled"
        print(f"{one.name:44s} sm_{one.architecture:<4d} {needs}  {one.instructions}  {one.problem}")
    return int(any(one.problem for one in compiled))


if __name__ == "__main__":
    sys.exit(main())
