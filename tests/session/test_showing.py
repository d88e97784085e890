"""What show says of a model agrees with its files."""

import json
from pathlib import Path

import catalog_cases
import pytest

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.errors import CheckpointError, HubError
from salalocal.session.showing import show_model
from salalocal.settings import load_settings, models_folder

COPY = "acme--tiny-int4-g128-rtn"


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Path:
    catalog_cases.use_empty_places(tmp_path, monkeypatch)
    return catalog_cases.put_into_cache("acme/tiny", seed)


def test_a_model_of_the_hub(source: Path) -> None:
    report = show_model(load_settings({"model": "acme/tiny", "device": "cpu"}, {}))
    assert report.commit == catalog_cases.COMMIT and report.licence == "apache-2.0" and report.card is None
    (total,) = report.schemes
    assert total.scheme == "bfloat16" and total.num_bytes == Checkpoint.open(source).num_bytes
    assert "q_proj" in total.kinds and "embed_tokens" in total.kinds
    assert [plan.num_tokens for plan in report.plans] == [2**16, 2**18, 2**20] and report.longest_tokens > 0


def test_a_quantized_copy_has_its_schemes_and_its_card(source: Path) -> None:
    folder = catalog_cases.make_copy(source, COPY)
    card = json.loads((folder / "quantization_card.json").read_text())
    report = show_model(load_settings({"model": COPY, "device": "cpu"}, {}))
    assert report.card == card and report.entry.method == "rtn" and report.commit is None
    by_scheme = {total.scheme: total for total in report.schemes}
    assert {"int4, groups of 128", "bfloat16"} == set(by_scheme)
    assert sum(total.num_tensors for total in report.schemes) == len(Checkpoint.open(source).tensor_names)
    assert "lm_head" in by_scheme["bfloat16"].kinds and "down_proj" in by_scheme["int4, groups of 128"].kinds


def test_the_licence_comes_from_the_card_or_the_licence_file(source: Path) -> None:
    (source / "README.md").write_text("# no front matter\nlicense: not this\n")
    (source / "LICENSE").write_text("\n  Apache License\n Version 2.0\n")
    assert show_model(load_settings({"model": str(source)}, {})).licence == "Apache License"
    (source / "LICENSE").unlink()
    assert show_model(load_settings({"model": str(source)}, {})).licence is None


def test_a_damaged_model_is_an_error_that_says_why(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="too short"):
        show_model(load_settings({"model": "acme/tiny"}, {}))
    (models_folder() / COPY).mkdir(parents=True)
    with pytest.raises(HubError):
        show_model(load_settings({"model": COPY}, {}))
