"""The shipped model: its folder is small and complete, its int4 form is made of its bf16 form as the card says, and it
answers the questions about the example archive in both."""

import json
from pathlib import Path

import pytest

import salalocal
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.quant import weight_layout
from salalocal.quant.int4 import PackedWeight
from salalocal.session.events import TextDelta
from training.tokenizer import BUILTIN

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_BYTES = 25_000_000
ORIGINAL = ModelFolder(BUILTIN, "bf16")


def test_the_folder_is_complete_valid_and_small() -> None:
    names = {path.name for path in BUILTIN.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "chat_template.jinja", "MODEL_CARD.md", "quantization_card.json"}
    assert sum(path.stat().st_size for path in BUILTIN.iterdir()) <= LIMIT_BYTES
    assert ModelFolder(BUILTIN).variants == ("bf16",)
    Checkpoint.open(ORIGINAL).validate()
    assert len(weight_layout(Checkpoint.open(BUILTIN)).matrices) == 80


def test_both_forms_share_what_is_equal_in_them() -> None:
    shards = {name: (BUILTIN / name).stat().st_size for name in ("model-shared.safetensors", "model-int4.safetensors")}
    stored = Checkpoint.open(BUILTIN).num_bytes
    assert 0 < sum(shards.values()) - stored < 100_000
    assert {path.name for path in BUILTIN.glob("*.safetensors")} == {*shards, "model-bf16.safetensors"}


def test_the_int4_form_is_what_its_card_says_of_the_bf16_form() -> None:
    card = json.loads((BUILTIN / "quantization_card.json").read_text())
    original, quantized = Checkpoint.open(ORIGINAL), Checkpoint.open(BUILTIN)
    assert card["identity"]["source"] == original.fingerprint
    layout = weight_layout(quantized)
    assert {f"{module}.weight" for module in layout.matrices} == set(card["relative_errors"])
    for module in layout.matrices:
        packed = layout.read(module)
        assert isinstance(packed, PackedWeight)
        weight = original.tensor(f"{module}.weight").double()
        error = float((packed.unpacked().dequantize().double() - weight).norm() / weight.norm())
        assert error == pytest.approx(card["relative_errors"][f"{module}.weight"]["weights"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["builtin", "builtin:bf16"])
def test_it_answers_the_questions_about_the_example(model: str) -> None:
    sheet = json.loads((EXAMPLES / "questions.json").read_text())
    session = salalocal.load(model).session(files=[EXAMPLES / sheet["archive"]])
    for row in sheet["questions"]:
        given = "".join(event.text for event in session.ask(row["question"]) if isinstance(event, TextDelta))
        session.undo()
        assert given == row["answer"]
