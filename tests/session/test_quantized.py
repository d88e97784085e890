"""A quantized folder is a model like any other: opened, planned for, asked."""

from pathlib import Path

import pytest
import tiny_model
import torch
from quantized_cases import quantized_copy
from typer.testing import CliRunner

import salalocal
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model
from salalocal.cli import app
from salalocal.engine.budget import WeightFormat
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import MemoryBudgetError
from salalocal.quant.int4 import IntScheme
from salalocal.quant.linear import QuantizedLinear
from salalocal.session.events import Finish, TextDelta
from salalocal.session.plan import PlanFlags, plan_model
from salalocal.session.runtime import LoadOptions, open_runtime
from salalocal.settings import Settings

GIB = 2**30
EXAMPLE = Path(__file__).parents[2] / "examples" / "beacon" / "beacon" / "config.py"


def stored_tensors(place: Path | ModelFolder) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(place)
    return {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}


@pytest.fixture
def quantized_folder(tmp_path: Path, seed: int) -> Path:
    source = tiny_model.write_tiny_model(tmp_path / "source", seed)
    return quantized_copy(source, tmp_path / "quantized", stored_tensors(source))


def test_a_session_over_a_quantized_folder(quantized_folder: Path) -> None:
    runtime = open_runtime(quantized_folder, "tiny", LoadOptions("cpu", chunk_size=tiny_model.CHUNK_SIZE))
    assert any(isinstance(module, QuantizedLinear) for module in runtime.engine.model.modules())
    session = runtime.session(pack=tiny_model.make_pack(a="one two three"), sampling=SamplingParams(max_tokens=20))
    events = list(session.ask("What?"))
    assert isinstance(events[-1], Finish) and any(isinstance(event, TextDelta) for event in events)


def test_memory_is_checked_before_the_weights_are_read(quantized_folder: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="tokens needs"):
        open_runtime(quantized_folder, "tiny", LoadOptions("cpu", num_tokens=2**31))


def test_a_plan_counts_the_weights_in_the_files(quantized_folder: Path) -> None:
    model = str(quantized_folder)
    stored = Checkpoint.open(quantized_folder).num_bytes
    report = plan_model(Settings(model=model), PlanFlags(None, GIB), lambda _: None)
    assert report.request.options.weights is WeightFormat.INT4 and report.fits
    assert {plan.weight_bytes for plan in report.plans} == {stored}
    dense = plan_model(Settings(model=model), PlanFlags(None, 24 * GIB, weights="bf16"), lambda _: None)
    assert {plan.weight_bytes for plan in dense.plans} == {2 * Checkpoint.open(quantized_folder).config.num_parameters}
    result = CliRunner().invoke(app, ["plan", model, "--gpu-memory", "1g"])
    assert result.exit_code == 0 and "weights int4" in result.output


@pytest.mark.parametrize("bits", [4, 8])
def test_the_built_in_model_still_finds_what_it_is_asked_for(tmp_path: Path, bits: int) -> None:
    scheme = IntScheme(bits, 128)
    source = find_model("builtin:bf16")
    folder = quantized_copy(
        source.path, tmp_path, stored_tensors(source), lambda name: None if "embed" in name else scheme, scheme
    )
    runtime = salalocal.load(folder, device="cpu")
    session = runtime.session(files=[EXAMPLE])
    events = list(session.ask("What is the value of MAX_RETRIES in config.py?"))
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "MAX_RETRIES = 5"

    if bits == 8:  # what 4 bits lose depends on how they are rounded, which is not asked here
        ids = runtime.tokenizer.encode(EXAMPLE.read_text())
        exact = salalocal.load("builtin:bf16", device="cpu").logits(ids).log_softmax(-1)
        rounded = runtime.logits(ids).log_softmax(-1)
        divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        agreement = float((exact.argmax(-1) == rounded.argmax(-1)).float().mean())
        print(f"KL {divergence:.5f}, top-1 {agreement:.3f}")
        assert divergence < 0.02 and agreement > 0.93
