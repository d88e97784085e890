"""Quantizing by name: the place of the result, the calibration text, and a model that can be asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import tiny_tokenizer
import torch

from salalocal.checkpoint.folder import ModelFolder
from salalocal.errors import CheckpointError, HubError, PackError, RequestError
from salalocal.quant.job import CARD_FILE
from salalocal.quant.quantizer import Quantizer, StepProgress
from salalocal.quant.recipe import QuantizeOptions
from salalocal.session import quantizing
from salalocal.session.quantizing import (
    Measure,
    QuantizedModel,
    QuantizeRequest,
    quantize_model,
    usual_method,
)
from salalocal.session.runtime import LoadOptions, open_runtime
from salalocal.session.start import Sources
from salalocal.session.texts import Ids
from salalocal.settings import Settings

RTN = QuantizeOptions(group_size=8)
GPTQ = QuantizeOptions(method="gptq", group_size=8)


@pytest.fixture
def model(tmp_path: Path, seed: int) -> Path:
    return tiny_model.write_tiny_model(tmp_path / "tiny", seed)


def quantize(model: Path, request: QuantizeRequest, measure: Measure | None = None) -> tuple[QuantizedModel, list[str]]:
    told: list[str] = []
    settings = Settings(model=str(model), device="cpu")
    return quantize_model(settings, request, lambda progress: None, told.append, measure), told


def texts(folder: Path, words: int) -> Sources:
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the value of {name} " * words)
    return Sources((str(folder),), "path")


def test_the_result_stands_among_the_users_data(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "models_folder", lambda: tmp_path / "data" / "models")
    made, told = quantize(model, QuantizeRequest(RTN))
    assert made.folder == tmp_path / "data" / "models" / "tiny-int4-g8-rtn"
    assert told == [f"result: {made.folder}"]
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


def test_without_files_gptq_calibrates_on_the_shipped_text(model: Path, tmp_path: Path) -> None:
    made, told = quantize(model, QuantizeRequest(GPTQ, tmp_path / "out", calibration_tokens=300))
    assert made.card["identity"]["calibration"]["sequence_tokens"] == [300]
    line = next(line for line in told if line.startswith("calibration: "))
    assert line.startswith("calibration: 300 of the ") and line.endswith(" tokens of the shipped calibration text")


def test_every_sequence_begins_with_the_start_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Ids]] = []

    def listening(*arguments: Any, **options: Any) -> Quantizer:
        given.append(arguments[3])
        return Quantizer(*arguments, **options)

    monkeypatch.setattr(quantizing, "DEFAULT_SEQUENCE_TOKENS", 90)
    monkeypatch.setattr(quantizing, "Quantizer", listening)
    quantize(model, QuantizeRequest(GPTQ, tmp_path / "out", texts(tmp_path / "t", 60), calibration_tokens=200))
    assert [len(sequence) for sequence in given[0]] == [90, 90]
    assert {sequence[0] for sequence in given[0]} == {tiny_tokenizer.BOS_ID}


def test_what_the_copy_has_lost_joins_its_card_and_is_measured_once(model: Path, tmp_path: Path) -> None:
    measured: list[tuple[ModelFolder, ModelFolder]] = []

    def measure(original: ModelFolder, quantized: ModelFolder) -> dict[str, Any] | None:
        assert (quantized.path / "config.json").exists()
        measured.append((original, quantized))
        return {"kl_mean_nats": 0.25} if len(measured) > 1 else None

    request = QuantizeRequest(RTN, tmp_path / "out")
    plain, _ = quantize(model, QuantizeRequest(RTN, tmp_path / "plain"))
    assert "quality" not in quantize(model, request, measure)[0].card  # it could not
    for _ in range(2):
        made, _ = quantize(model, request, measure)
        assert made.card == {**plain.card, "quality": {"kl_mean_nats": 0.25}}
        assert json.loads((tmp_path / "out" / CARD_FILE).read_text()) == made.card
    assert measured == [(ModelFolder(model), ModelFolder(tmp_path / "out"))] * 2


def test_a_run_stopped_while_it_measures_ends_in_the_same_card(model: Path, tmp_path: Path) -> None:
    def stop(original: ModelFolder, quantized: ModelFolder) -> None:
        raise KeyboardInterrupt

    def measure(original: ModelFolder, quantized: ModelFolder) -> dict[str, Any]:
        return {"kl_mean_nats": 0.25}

    quantize(model, QuantizeRequest(RTN, tmp_path / "undisturbed"), measure)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, QuantizeRequest(RTN, tmp_path / "stopped"), stop)
    quantize(model, QuantizeRequest(RTN, tmp_path / "stopped"), measure)
    undisturbed, stopped = (tmp_path / name for name in ("undisturbed", "stopped"))
    names = sorted(path.name for path in undisturbed.iterdir())
    assert names == sorted(path.name for path in stopped.iterdir())
    assert all((undisturbed / name).read_bytes() == (stopped / name).read_bytes() for name in names)


def test_the_usual_method_is_gptq_where_it_takes_minutes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    settings = Settings(model=str(model), device="cpu")
    assert usual_method(settings, told.append) == "gptq"
    monkeypatch.setattr(quantizing, "_MOST_PARAMETERS_ON_CPU", 10)
    assert usual_method(settings, told.append) == "rtn"
    assert told[0] == "method: gptq, which loses least" and "rtn, since" in told[1]


def test_requests_that_cannot_be_met(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="folder of the model itself"):
        quantize(model, QuantizeRequest(RTN, model))
    with pytest.raises(PackError):
        quantize(model, QuantizeRequest(GPTQ, tmp_path / "out", Sources((str(tmp_path / "missing"),), "path")))
    with pytest.raises(RequestError, match="too few") as raised:
        QuantizeRequest(GPTQ, calibration_tokens=31)
    assert "--calibration-tokens 32" in raised.value.hint
    with pytest.raises(HubError):
        quantize(Path("nobody/nothing"), QuantizeRequest(RTN, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_made_is_refused_before_the_text_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = quantize(model, QuantizeRequest(RTN, tmp_path / "small"))
    monkeypatch.setattr(quantizing, "_calibration", lambda *_: pytest.fail("the text is read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "of").mkdir(parents=True)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(made.folder, QuantizeRequest(GPTQ, tmp_path / "out"))
    for options in (QuantizeOptions(method="gptq", head_bits=8), QuantizeOptions(method="gptq", group_size=128)):
        with pytest.raises(RequestError, match=r"lm_head|do not fit"):
            quantize(model, QuantizeRequest(options, tmp_path / "out"))
    for name in ("file", "full"):
        with pytest.raises(RequestError, match="exists"):
            quantize(model, QuantizeRequest(GPTQ, tmp_path / name))
    for nameless in ("", "..", "/"):
        with pytest.raises(RequestError, match="does not name a folder"):
            quantize(model, QuantizeRequest(GPTQ, Path(nameless)))
    with pytest.raises(CheckpointError, match="too long") as raised:
        quantize(model, QuantizeRequest(GPTQ, tmp_path / ("x" * 300)))
    assert "--out" in raised.value.hint


def test_the_method_goes_by_the_original() -> None:
    told: list[str] = []
    with pytest.raises(RequestError, match="model builtin: quantized already") as raised:
        usual_method(Settings(model="builtin", device="cpu"), told.append)
    assert raised.value.hint == "salalocal quantize --model builtin:bf16" and not told
    assert usual_method(Settings(model="builtin:bf16", device="cpu"), told.append) == "gptq"


def test_who_stops_it_is_told_that_it_goes_on(model: Path, tmp_path: Path) -> None:
    def stop(progress: StepProgress) -> None:
        raise KeyboardInterrupt

    told: list[str] = []
    request = QuantizeRequest(RTN, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize_model(Settings(model=str(model), device="cpu"), request, stop, told.append)
    assert told[-1] == "stopped: the same command goes on from here"
