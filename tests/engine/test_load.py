"""Loading: the right numbers in the right dtype, mapped where possible, and never more memory than the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import random_tensors, small_config, written
from quantized_cases import GROUPS_OF_16, gptq_record, projections, quantized_tensors, written_quantized

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import expected_tensors
from salalocal.checkpoint.writer import write_checkpoint
from salalocal.device import DeviceMemory
from salalocal.engine import load as load_module
from salalocal.engine.engine import Engine
from salalocal.engine.load import MAX_DEFAULT_FLOAT32_BYTES, Placement, default_dtype, load_model, weight_bytes
from salalocal.errors import CheckpointError, MemoryBudgetError
from salalocal.kernels.cpu_int4_matmul import max_kernel_rows
from salalocal.model.config import SalaConfig
from salalocal.model.sala import SalaModel
from salalocal.quant.int4 import IntScheme
from salalocal.quant.linear import CpuInt4Linear, QuantizedLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_a_loaded_model_has_the_weights_of_the_checkpoint(
    tmp_path: Path, seed: int, tied: bool, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    config = small_config(tied, stored)
    tensors = random_tensors(config, seed, stored)
    model = load_model(Checkpoint.open(written(tmp_path, config, tensors, 20_000)), CPU, asked)
    dtype = asked or torch.float32  # the default of a small model on a CPU
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.to(dtype)) and state[name].dtype == dtype, name
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == dtype and model.device == CPU

    plain = SalaModel(config, dtype=dtype)
    plain.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    ids = list(range(90))
    assert torch.equal(Engine(model).logits(ids), Engine(plain).logits(ids))


def test_tensors_in_their_own_dtype_are_not_copied(tmp_path: Path) -> None:
    config = small_config()
    checkpoint = Checkpoint.open(written(tmp_path, config, random_tensors(config, 1)))
    model = load_model(checkpoint, CPU)
    for name in expected_tensors(config):
        assert model.get_parameter(name).data_ptr() == checkpoint.tensor(name).data_ptr(), name


def test_the_default_dtype_is_float32_for_a_small_model_on_a_cpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(written(tmp_path, config, random_tensors(config, 1, torch.bfloat16)))
    assert default_dtype(checkpoint, CPU) == torch.float32
    assert default_dtype(checkpoint, torch.device("cuda", 0)) == torch.bfloat16
    monkeypatch.setattr(load_module, "MAX_DEFAULT_FLOAT32_BYTES", 4 * config.num_parameters - 1)
    assert default_dtype(checkpoint, CPU) == torch.bfloat16
    assert 4 * SalaConfig.released().num_parameters > MAX_DEFAULT_FLOAT32_BYTES


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(written(tmp_path, config, random_tensors(config, 1, torch.bfloat16)))
    free = 4 * config.num_parameters - 1
    monkeypatch.setattr(load_module, "device_memory", lambda _: DeviceMemory(10**9, free))
    load_model(checkpoint, CPU, torch.bfloat16)  # stays in the file
    monkeypatch.setattr(load_module, "SalaModel", lambda *_, **__: pytest.fail("was made"))
    with pytest.raises(MemoryBudgetError, match="float32 need"):
        load_model(checkpoint, CPU, torch.float32)


def test_a_folder_that_is_no_whole_model_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(small_config(), 1)
    del tensors["model.norm.weight"]
    checkpoint = Checkpoint.open(written(tmp_path, small_config(), tensors))
    monkeypatch.setattr(load_module, "SalaModel", lambda *_, **__: pytest.fail("was made"))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.norm\.weight"):
        load_model(checkpoint, CPU)


# Loads a checkpoint, runs some tokens through it and prints the growth of anonymous memory at its peak, in bytes.
MEASURED = """
import sys, threading, time, torch
from pathlib import Path
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.engine.engine import Engine
from salalocal.engine.load import load_model
torch.set_num_threads(1)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap"))) * 1024
base = peak = anonymous()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(Checkpoint.open(sys.argv[1]), torch.device("cpu"), getattr(torch, sys.argv[2]))
loaded = max(peak, anonymous()) - base
Engine(model).prefill(list(range(8)), Engine(model).new_state())
stop.set()
watcher.join()
print(loaded, max(peak, anonymous()) - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's own figures")
def test_loading_takes_no_more_memory_than_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of some 200 MB: mapped it takes next to nothing, cast to float32 its float32 size and one tensor."""
    config = small_config(dtype=torch.bfloat16, hidden_size=1536, intermediate_size=4096, vocab_size=8192)
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.01, 0.01, generator=generator))
        for name, shape in expected_tensors(config).items()
    )
    folder = tmp_path / "model"
    write_checkpoint(folder, config.to_hf(), tensors, 64 * 2**20)
    size = Checkpoint.open(folder).num_bytes
    largest = 2 * 8192 * 1536
    assert size > 200_000_000
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for dtype, allowed_load, allowed_run in (
        ("bfloat16", 8 * 2**20, 64 * 2**20),
        ("float32", 2 * size + 2 * largest + 8 * 2**20, 2 * size + 2 * largest + 64 * 2**20),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(folder), dtype],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        loaded, run = map(int, done.stdout.split())
        print(f"{dtype}: checkpoint {size:,}, loading {loaded:,}, with a prefill {run:,} bytes of anonymous memory")
        assert loaded <= allowed_load and run <= allowed_run


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_quantized_folder_computes_what_its_codes_mean(
    tmp_path: Path, seed: int, tied: bool, dtype: torch.dtype, tolerance: float
) -> None:
    config = small_config(tied)
    stored, dense = quantized_tensors(random_tensors(config, seed), projections)
    folder = written_quantized(tmp_path, config, stored, gptq_record(GROUPS_OF_16))
    model = load_model(Checkpoint.open(folder), CPU, dtype)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 4 * 7
    assert model.dtype == dtype and not any(parameter.is_meta for parameter in model.parameters())

    plain = SalaModel(config, dtype=torch.float32)
    plain.load_state_dict(dense)
    ids = list(range(90))
    logits, exact = Engine(model).logits(ids), Engine(plain).logits(ids)
    assert (logits - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_any_cut_of_a_text_gives_a_quantized_model_the_same(
    tmp_path: Path, seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The law of the dense model, within what bf16 rounding of a linear map's inputs and outputs leaves of it: torch's
    int4 kernel rounds them, and with AVX2 takes few rows only. The text ends before blocks are picked, whose near ties
    any rounding may flip."""
    scheme = IntScheme(4, 32)
    config = small_config(hidden_size=64, intermediate_size=96)
    stored, _ = quantized_tensors(random_tensors(config, seed), lambda name: scheme if "_proj." in name else None)
    model = load_model(Checkpoint.open(written_quantized(tmp_path, config, stored, gptq_record(scheme))), CPU, dtype)
    if max_kernel_rows():
        # Whole blocks of output features are needed: 32 with AVX2, 64 with AVX512, which fewer of these maps have.
        assert sum(isinstance(module, CpuInt4Linear) for module in model.modules()) >= 8
    ids = torch.randint(90, (config.sparse.dense_len - 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    whole = Engine(model).logits(ids, len(ids))
    for chunk_size in (1, 7, 33):
        error = float((Engine(model).logits(ids, chunk_size) - whole).norm() / whole.norm())
        assert error < tolerance


def test_a_quantized_folder_needs_its_packed_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(hidden_size=256, intermediate_size=512)
    stored, _ = quantized_tensors(random_tensors(config, 1), projections)
    checkpoint = Checkpoint.open(written_quantized(tmp_path, config, stored, gptq_record(GROUPS_OF_16)))
    assert default_dtype(checkpoint, CPU) == torch.float32
    needed = weight_bytes(checkpoint, CPU, torch.float32)
    # Scales are counted with four bytes, though stored in two, and zero points are not kept.
    assert checkpoint.num_bytes <= needed < 1.25 * checkpoint.num_bytes < 4 * config.num_parameters
    monkeypatch.setattr(load_module, "device_memory", lambda device: DeviceMemory(total_bytes=2**40, free_bytes=1000))
    with pytest.raises(MemoryBudgetError):
        load_model(checkpoint, CPU)


def test_a_table_in_host_memory_is_not_counted_on_the_device(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(written(tmp_path, config, random_tensors(config, seed, torch.bfloat16)))
    table = 4 * config.vocab_size * config.hidden_size
    memory = DeviceMemory(2**30, 4 * config.num_parameters - table)  # just enough for the rest in float32
    monkeypatch.setattr(load_module, "device_memory", lambda device: memory)
    monkeypatch.setattr(load_module, "page_locked_empty", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    with pytest.raises(MemoryBudgetError):
        load_model(checkpoint, CPU, torch.float32)
    model = load_model(checkpoint, CPU, torch.float32, Placement(is_embedding_on_host=True))
    assert torch.equal(model.model.embed_tokens.weight, checkpoint.tensor("model.embed_tokens.weight").float())


def test_opening_a_model_brings_in_no_compiler_of_torch() -> None:
    """torch._dynamo with sympy takes over a second of every start."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import salalocal; salalocal.load;"
    code += "sys.exit(('torch._dynamo' in sys.modules) != before)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
