"""Every kind of quantized folder end to end: written by the quantizer, read back, and the model computes with it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config, written
from quantized_cases import gptq_by_hand, random_weight
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.engine.load import load_model
from salalocal.model.config import LIGHTNING, SPARSE
from salalocal.model.sala import SalaModel
from salalocal.quant import weight_layout
from salalocal.quant.codebook import CodebookLinear, CodebookScheme, round_to_codebook
from salalocal.quant.int4 import IntScheme, from_gptq
from salalocal.quant.linear import QuantizedLinear
from salalocal.quant.quantizer import Quantizer
from salalocal.quant.recipe import ROW, QuantizeOptions
from salalocal.quant.rounding import round_to_nearest
from salalocal.quant.stored import QuantizedWeight, Scheme, from_stored, joined, stored_tensors

CONFIG = small_config(dtype=torch.bfloat16, mixer_types=(SPARSE, LIGHTNING))
CPU = torch.device("cpu")
ROWS = QuantizeOptions(group_size=ROW)
HEAD = QuantizeOptions(group_size=8, head_bits=8)
KINDS = {
    "row": ROWS,
    "row, gptq": QuantizeOptions(method="gptq", group_size=ROW),
    "head": HEAD,
    "nf4": QuantizeOptions(method="nf4", group_size=64),
    "fp4": QuantizeOptions(method="fp4", group_size=128),
}


def texts(seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(CONFIG.vocab_size, (length,), generator=generator).tolist()) for length in (90, 70)]


def named(card: dict[str, Any]) -> Iterable[tuple[str, dict[str, float | None]]]:
    """The errors of every matrix by its name."""
    return card["relative_errors"].items()  # type: ignore[no-any-return]


def meaning(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by the name of the dense one, in float32."""
    layout, checkpoint = weight_layout(Checkpoint.open(folder)), Checkpoint.open(folder)
    dense = {name: checkpoint.tensor(name).float() for name in layout.dense}
    for module in layout.matrices:
        read = layout.read(module)
        whole = read.unpacked() if hasattr(read, "unpacked") else read
        dense[f"{module}.weight"] = whole.dequantize()
    return dense


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_what_was_written(tmp_path: Path, seed: int, kind: str) -> None:
    options = KINDS[kind]
    tensors = random_tensors(CONFIG, seed, torch.bfloat16)
    source = written(tmp_path / "model", CONFIG, tensors)
    sequences = [] if kind in ("row", "nf4") else texts(seed)
    card = Quantizer(source, tmp_path / "out", options, sequences).run()
    errors = [error["weights"] for error in card["relative_errors"].values()]
    assert all((error["outputs"] is None) == (not sequences or "head" in name) for name, error in named(card))
    assert 0 < max(errors) < 0.4 and card["result_bytes"] == Checkpoint.open(tmp_path / "out").num_bytes

    dense = meaning(tmp_path / "out")
    for name, tensor in tensors.items():
        assert dense[name].shape == tensor.shape
        if name not in card["relative_errors"]:
            assert torch.equal(dense[name], tensor.float())
    quantized = load_model(Checkpoint.open(tmp_path / "out"), CPU, torch.float32)
    plain = SalaModel(CONFIG, dtype=torch.float32)
    plain.load_state_dict(dense)
    ids = torch.tensor([texts(seed + 1)[0]])
    with torch.inference_mode():
        found, exact = (model.logits(model(ids, model.new_state())) for model in (quantized, plain))
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_a_resumed_run_reads_its_own_steps_back(tmp_path: Path, seed: int) -> None:
    source = written(tmp_path / "model", CONFIG, random_tensors(CONFIG, seed, torch.bfloat16))
    for kind, options in KINDS.items():
        Quantizer(source, tmp_path / kind / "one", options, texts(seed)).run()
        steps = []

        def stop_after_two(progress: object, steps: list[object] = steps) -> None:
            steps.append(progress)
            if len(steps) == 2:
                raise KeyboardInterrupt

        again = Quantizer(source, tmp_path / kind / "two", options, texts(seed))
        with pytest.raises(KeyboardInterrupt):
            again.run(stop_after_two)
        again.run()
        first, second = (
            {path.name: path.read_bytes() for path in (tmp_path / kind / name).iterdir()} for name in ("one", "two")
        )
        assert first == second


def test_codebook_maps_are_codebook_linears_and_the_head_a_quantized_one(tmp_path: Path, seed: int) -> None:
    source = written(tmp_path / "model", CONFIG, random_tensors(CONFIG, seed, torch.bfloat16))
    kinds = {}
    for kind in ("nf4", "head"):
        Quantizer(source, tmp_path / kind, KINDS[kind]).run()
        kinds[kind] = load_model(Checkpoint.open(tmp_path / kind), CPU, torch.float32)
    assert isinstance(kinds["nf4"].model.layers[0].mlp.down_proj, CodebookLinear)
    assert not isinstance(kinds["nf4"].lm_head, CodebookLinear | QuantizedLinear)
    assert isinstance(kinds["head"].lm_head, QuantizedLinear)
    record = Checkpoint.open(tmp_path / "head").config.quantization_config
    assert record is not None and record["lm_head"] is True


def test_rows_of_a_group_are_plain_gptq(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(CONFIG, seed, torch.bfloat16)
    Quantizer(written(tmp_path / "model", CONFIG, tensors), tmp_path / "out", ROWS).run()
    checkpoint = Checkpoint.open(tmp_path / "out")
    module = "model.layers.0.mlp.up_proj"
    leaves = {leaf: checkpoint.tensor(f"{module}.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    assert leaves["scales"].shape == (1, 80) and not leaves["g_idx"].any()
    expected = round_to_nearest(tensors[f"{module}.weight"].float(), IntScheme(4, 48), torch.bfloat16)
    assert torch.equal(torch.from_numpy(gptq_by_hand(leaves, zero_offset=1)).float(), expected.dequantize())


@pytest.mark.parametrize("scheme", [IntScheme(4, 16), IntScheme(8, 48), CodebookScheme("nf4")], ids=str)
def test_stored_tensors_are_restored_and_pieces_joined(seed: int, scheme: Scheme) -> None:
    pieces: list[QuantizedWeight] = []
    for n in range(3):
        if isinstance(scheme, IntScheme):
            pieces.append(random_weight(16, 48, scheme, seed + n))
        else:
            rows = torch.randn(16, 48, generator=torch.Generator().manual_seed(seed + n))
            pieces.append(round_to_codebook(rows, scheme, torch.bfloat16))
    whole = joined(pieces)
    assert torch.equal(whole.dequantize(), torch.cat([piece.dequantize() for piece in pieces]))
    back = from_stored(stored_tensors(whole), scheme)
    assert type(back) is type(whole) and torch.equal(back.dequantize(), whole.dequantize())


def test_a_row_and_a_head_are_read_by_their_shapes(seed: int) -> None:
    weight = random_weight(32, 48, IntScheme(4, 48), seed)
    assert torch.equal(from_gptq(stored_tensors(weight), {"group_size": -1}).dequantize(), weight.dequantize())
