"""The quantizer on a CUDA device against the CPU: the same matrices but for near ties, the same bytes every time.

Run on a machine with a card: `make test-gpu`.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quantize_full import calibration_ids
from benchmarks.synthetic_checkpoint import small_config, write_synthetic
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.engine.load import load_model
from salalocal.kernels.column_walk import column_walk_definition, column_walk_reference, column_walk_triton
from salalocal.quant import quantizer as quantizer_module
from salalocal.quant.gptq import make_feedback
from salalocal.quant.int4 import IntScheme, IntWeight
from salalocal.quant.matrix import Inputs, quantize_matrix
from salalocal.quant.quantizer import Quantizer, StepProgress
from salalocal.quant.recipe import QuantizeOptions
from salalocal.quant.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = small_config(3)
TEXTS = calibration_ids(CONFIG.vocab_size, 6, 400, 0)
OPTIONS = {method: QuantizeOptions(method=method, group_size=32) for method in ("rtn", "gptq")}


@pytest.fixture
def source(tmp_path: Path, seed: int) -> Path:
    write_synthetic(tmp_path / "model", CONFIG, seed, CPU)
    return tmp_path / "model"


def run(source: Path, out: Path, method: str, device: torch.device) -> dict[str, Any]:
    return Quantizer(source, out, OPTIONS[method], TEXTS, device=device).run()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("num_out", "num_in"), [(4096, 4096), (1000, 640), (17, 128)])
def test_the_walk_of_a_matrix_is_that_of_the_cpu(num_out: int, num_in: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator).bfloat16()
    rows = torch.randn(3 * num_in, num_in, generator=generator) * torch.logspace(0, 1, num_in)
    moments = (rows.t() @ rows).double() / len(rows)
    made, errors = [], []
    for device in (CPU, CUDA):
        here = moments.to(device)
        with Workers() as workers:
            quantized, error = quantize_matrix(
                weight.to(device), IntScheme(4, 128), torch.bfloat16, Inputs(here.float(), make_feedback(here)), workers
            )
        assert isinstance(quantized, IntWeight) and quantized.codes.device.type == device.type
        made.append(quantized)
        errors.append(error)
    assert (made[0].codes == made[1].codes.cpu()).float().mean() > 0.995
    assert errors[1].weights == pytest.approx(errors[0].weights, rel=1e-3)
    assert errors[1].outputs == pytest.approx(errors[0].outputs, rel=1e-3)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(5_000, 128), (1, 128), (333, 100)])
def test_the_kernel_of_the_walk_errs_no_more_than_torch(num_rows: int, num_columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(num_rows, num_columns, generator=generator)
    factor = (0.1 * torch.randn(num_columns, num_columns, generator=generator)).triu(1) + torch.eye(num_columns)
    scales = torch.rand(num_rows, num_columns, generator=generator) * 0.2 + 0.2
    codes, errors = column_walk_definition(block[:64], factor, scales[:64], 4)
    distances = []
    for walk in (column_walk_reference, column_walk_triton):
        found, lost = walk(block.to(CUDA), factor.to(CUDA), scales.to(CUDA), 4)
        is_same = (found[:64].cpu() == codes).all(1)
        assert is_same.float().mean() > 0.9
        distances.append(float((lost[:64].cpu().double() - errors)[is_same].abs().max()))
    assert distances[1] <= 2 * distances[0] + 1e-6


def hidden_states(folder: Path) -> torch.Tensor:
    model = load_model(Checkpoint.open(folder), CPU, torch.float32)
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([text]), model.new_state())[0] for text in TEXTS])


def test_rounding_comes_out_as_on_the_cpu(source: Path, tmp_path: Path) -> None:
    for device in (CPU, CUDA):
        run(source, tmp_path / device.type, "rtn", device)
    folders = [Checkpoint.open(tmp_path / device.type) for device in (CPU, CUDA)]
    for name in folders[0].tensor_names:
        first, second = (folder.tensor(name) for folder in folders)
        is_packed = name.endswith(("qweight", "scales"))
        equal = (first.view(torch.uint8) == second.view(torch.uint8)).float().mean()
        assert equal > 0.99 if is_packed else torch.equal(first, second), name


def test_gptq_errs_as_on_the_cpu(source: Path, tmp_path: Path) -> None:
    # TF32 products move the targets a little; a code that falls the other way moves those behind it in its row.
    expected, errors = hidden_states(source), []
    cards = [run(source, tmp_path / device.type, "gptq", device) for device in (CPU, CUDA)]
    for device in (CPU, CUDA):
        found = hidden_states(tmp_path / device.type)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    outputs = [sum(error["outputs"] for error in card["relative_errors"].values()) for card in cards]
    assert outputs[1] == pytest.approx(outputs[0], rel=0.05)


@pytest.mark.parametrize("method", OPTIONS)
def test_every_run_gives_the_same_bytes_also_resumed(
    source: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "first", method, CUDA)
    expected = contents(tmp_path / "first")
    run(source, tmp_path / "again", method, CUDA)
    assert contents(tmp_path / "again") == expected

    def stop(progress: StepProgress) -> None:
        assert progress.device_peak_bytes > 0
        if progress.step == last:
            raise KeyboardInterrupt

    for keep_after_s, last in itertools.product((0, 1e9), (2, 4)):
        monkeypatch.setattr(quantizer_module, "_KEEP_HIDDEN_AFTER_S", keep_after_s)
        monkeypatch.setattr(quantizer_module, "_WORK_PER_WRITING", 0)
        out = tmp_path / f"stopped-{keep_after_s}-{last}"
        with pytest.raises(KeyboardInterrupt):
            Quantizer(source, out, OPTIONS[method], TEXTS, device=CUDA).run(stop)
        run(source, out, method, CUDA)
        assert contents(out) == expected
