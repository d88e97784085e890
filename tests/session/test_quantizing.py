"""Quantizing by name: the place of the result, the calibration text, and a model that can be asked."""

from pathlib import Path

import pytest
import tiny_model
import torch

from salalocal.errors import HubError, PackError, RequestError
from salalocal.quant.recipe import QuantizeOptions
from salalocal.session import quantizing
from salalocal.session.quantizing import QuantizedModel, QuantizeRequest, quantize_model
from salalocal.session.runtime import LoadOptions, open_runtime
from salalocal.session.start import Sources
from salalocal.settings import Settings

RTN = QuantizeOptions(group_size=8)
GPTQ = QuantizeOptions(method="gptq", group_size=8)


@pytest.fixture
def model(tmp_path: Path, seed: int) -> Path:
    return tiny_model.write_tiny_model(tmp_path / "tiny", seed)


def quantize(model: Path, request: QuantizeRequest) -> tuple[QuantizedModel, list[str]]:
    told: list[str] = []
    made = quantize_model(Settings(model=str(model)), request, lambda progress: None, told.append)
    return made, told


def texts(folder: Path, words: int) -> Sources:
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the value of {name} " * words)
    return Sources((str(folder),), "path")


def test_the_result_stands_among_the_users_data(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing.platformdirs, "user_data_path", lambda *_, **__: tmp_path / "data")
    made, told = quantize(model, QuantizeRequest(RTN))
    assert made.folder == tmp_path / "data" / "models" / "tiny-int4-g8-rtn"
    assert told[0].startswith(f"model: {model}") and told[-1] == f"result: {made.folder}"
    assert made.card["identity"]["calibration"] is None
    again, _ = quantize(model, QuantizeRequest(RTN))
    assert again == made


def test_the_result_answers_like_its_source(model: Path, tmp_path: Path) -> None:
    made, _ = quantize(
        model, QuantizeRequest(QuantizeOptions(bits=8, sensitive_bits=8, group_size=8), tmp_path / "out")
    )
    runtimes = [open_runtime(folder, "tiny", LoadOptions("cpu")) for folder in (model, made.folder)]
    ids = runtimes[0].tokenizer.encode("the value of data is in the file " * 20)
    found = [runtime.logits(ids) for runtime in runtimes]
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.05
    assert not torch.equal(*found)


def test_calibration_text_is_read_as_a_prompt_and_no_more_than_asked(model: Path, tmp_path: Path) -> None:
    request = QuantizeRequest(GPTQ, tmp_path / "out", texts(tmp_path / "texts", 60), calibration_tokens=200)
    made, told = quantize(model, request)
    used = made.card["identity"]["calibration"]
    assert used["sequence_tokens"] == [200]
    line = next(line for line in told if line.startswith("calibration: "))
    assert line.startswith("calibration: 200 of the ") and line.endswith(" tokens of 3 files")
    assert all(error["outputs"] is not None for error in made.card["relative_errors"].values())
    other = QuantizeRequest(GPTQ, tmp_path / "other", request.calibration, calibration_tokens=150)
    assert quantize(model, other)[0].card["identity"]["calibration"]["sha256"] != used["sha256"]


def test_requests_that_cannot_be_met(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs calibration"):
        quantize(model, QuantizeRequest(GPTQ, tmp_path / "out"))
    with pytest.raises(RequestError, match="folder of the model itself"):
        quantize(model, QuantizeRequest(RTN, model))
    with pytest.raises(PackError):
        quantize(model, QuantizeRequest(GPTQ, tmp_path / "out", Sources((str(tmp_path / "missing"),), "path")))
    with pytest.raises(RequestError, match="tokens of calibration text"):
        quantize(model, QuantizeRequest(GPTQ, tmp_path / "out", texts(tmp_path / "t", 1), calibration_tokens=9))
    with pytest.raises(HubError):
        quantize(Path("nobody/nothing"), QuantizeRequest(RTN, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
