"""Two model folders compared by name: the text, the figures, what is told, and how much is in memory at once."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import tiny_tokenizer
from quantized_cases import quantized_copy

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.errors import CheckpointError, HubError, MemoryBudgetError, PackError, RequestError
from salalocal.evals import comparison
from salalocal.evals.comparison import DivergenceRequest, EvalProgress, compare_by_name, measure_copy
from salalocal.session.start import Sources
from salalocal.session.texts import TokenText
from salalocal.settings import Settings


@pytest.fixture
def models(tmp_path: Path, seed: int) -> tuple[Path, Path]:
    """A tiny model and a rounded copy of it."""
    source = tiny_model.write_tiny_model(tmp_path / "tiny", seed)
    checkpoint = Checkpoint.open(source)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}
    return source, quantized_copy(source, tmp_path / "copy", tensors)


@pytest.fixture
def text(tmp_path: Path) -> Sources:
    (tmp_path / "text.txt").write_text("the value of data is in the file " * 40)
    return Sources((str(tmp_path / "text.txt"),), "path")


@pytest.fixture
def short_shipped_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped text would take a tiny model half a minute."""
    text = TokenText("the shipped evaluation text", (tuple(range(1, 90)), tuple(range(1, 60))))
    monkeypatch.setattr(comparison, "shipped_text", lambda name, codec: text)


def settings(model: Path, **more: Any) -> Settings:
    return Settings(model=str(model), device="cpu", **more)


def compared(
    models: tuple[Path, Path], request: DivergenceRequest, **more: Any
) -> tuple[comparison.Comparison, list[EvalProgress], list[str]]:
    steps: list[EvalProgress] = []
    told: list[str] = []
    found = compare_by_name(settings(models[0], **more), request, steps.append, told.append)
    return found, steps, told


def test_files_are_read_by_both_models(models: tuple[Path, Path], text: Sources) -> None:
    request = DivergenceRequest(str(models[1]), text, sequence_tokens=100, max_tokens=250)
    found, steps, told = compared(models, request, chunk_size=64)
    assert told[0].startswith(f"model: {models[0]}")
    assert told[-1].startswith("evaluating on 250 of the ") and told[-1].endswith(" tokens of 1 file, in 3 sequences")
    assert found.divergence.num_sequences == 3 and found.divergence.num_tokens == 247
    assert 0 < found.divergence.kl_mean_nats < 5 and 0 < found.divergence.top1_agreement <= 1
    assert (found.dtype, found.device, found.sequence_tokens) == ("float32", "cpu", 100)
    assert [step.num_tokens for step in steps] == sorted(step.num_tokens for step in steps)
    assert steps[-1].num_tokens == steps[-1].total_tokens == 500
    assert [step.model for step in steps] == ["original"] * 5 + ["quantized"] * 5
    again, _, _ = compared(models, request, chunk_size=64)
    assert again == found


def test_json_has_every_figure_on_one_level(models: tuple[Path, Path], text: Sources) -> None:
    found, _, _ = compared(models, DivergenceRequest(str(models[1]), text))
    plain = found.to_json()
    assert set(plain) == {
        *("text", "text_sha256", "sequence_tokens", "dtype", "device", "num_sequences", "num_tokens"),
        *("perplexity_original", "perplexity_quantized", "kl_mean_nats", "kl_p99_nats", "top1_agreement"),
    }
    assert plain["kl_mean_nats"] == found.divergence.kl_mean_nats


def test_a_model_is_equal_to_itself_in_any_dtype(models: tuple[Path, Path], text: Sources) -> None:
    for dtype in ("float32", "bfloat16"):
        found, _, told = compared((models[0], models[0]), DivergenceRequest(str(models[0]), text), dtype=dtype)
        assert found.dtype == dtype and found.divergence.kl_mean_nats == 0
        assert "both are the same model: it is compared with itself" in told


@pytest.mark.usefixtures("short_shipped_text")
def test_without_files_the_shipped_text_is_used(models: tuple[Path, Path]) -> None:
    found, _, told = compared(models, DivergenceRequest(str(models[1])))
    assert found.text == "the shipped evaluation text" and found.divergence.num_tokens == 88 + 58
    assert told[-1] == "evaluating on 148 of the 148 tokens of the shipped evaluation text, in 2 sequences"


def test_the_layers_of_one_model_are_gone_before_the_other_is_loaded(
    models: tuple[Path, Path], text: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[list[bool]] = []
    layers: list[weakref.ref[Any]] = []
    opened = comparison.open_runtime

    def watched(*arguments: Any) -> Any:
        alive.append([layer() is not None for layer in layers])
        runtime = opened(*arguments)
        layers.extend(weakref.ref(layer) for layer in runtime.engine.model.model.layers)
        return runtime

    monkeypatch.setattr(comparison, "open_runtime", watched)
    compared(models, DivergenceRequest(str(models[1]), text, max_tokens=64))
    assert alive == [[], [False] * 4]


def test_what_cannot_be_compared_is_refused(models: tuple[Path, Path], text: Sources, tmp_path: Path) -> None:
    _, copy = models
    with pytest.raises(HubError, match="nothing"):
        compared(models, DivergenceRequest("nobody/nothing", text))
    with pytest.raises(PackError, match="missing"):
        compared(models, DivergenceRequest(str(copy), Sources((str(tmp_path / "missing"),), "path")))
    for flag, lengths in (("--tokens", {"max_tokens": 31}), ("--ctx", {"sequence_tokens": 4})):
        with pytest.raises(RequestError, match=f"{flag} .* too short") as raised:
            DivergenceRequest(str(copy), text, **lengths)
        assert raised.value.hint == f"{flag} 32"
    other = tiny_tokenizer.tokenizer_json()
    vocab = other["model"]["vocab"]
    names = {number: piece for piece, number in vocab.items()}
    vocab[names[40]], vocab[names[41]] = 41, 40
    tiny_tokenizer.write_tokenizer(copy, other)
    with pytest.raises(CheckpointError, match="different vocabularies: equal ids mean other texts"):
        compared(models, DivergenceRequest(str(copy), text))


@pytest.mark.usefixtures("short_shipped_text")
def test_a_copy_is_measured_for_its_card(models: tuple[Path, Path]) -> None:
    folders = [ModelFolder(model) for model in models]
    figures = measure_copy(settings(models[0]), *folders, lambda progress: None, lambda line: None)
    found, _, _ = compared(models, DivergenceRequest(str(models[1])))
    assert figures == found.to_json()


@pytest.mark.usefixtures("short_shipped_text")
def test_what_is_not_measured_is_told_with_the_command_that_does(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [ModelFolder(model) for model in models]

    def refusing(*_: Any) -> None:
        raise MemoryBudgetError("needs 20 GiB")

    for name, value, reason in (
        ("MAX_DEFAULT_FLOAT32_BYTES", 1000, "takes long on a CPU"),
        ("open_runtime", refusing, "needs 20 GiB"),
    ):
        told: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(comparison, name, value)
            assert measure_copy(settings(models[0]), *folders, lambda progress: None, told.append) is None
        assert any(line.startswith("quality not measured") and reason in line for line in told)
        assert told[-1] == f"to measure it: salalocal eval divergence --model {models[0]} --against {models[1]}"


def test_weights_without_a_tokenizer_are_not_measured(models: tuple[Path, Path]) -> None:
    (models[0] / "tokenizer.json").unlink()
    told: list[str] = []
    folders = [ModelFolder(model) for model in models]
    assert measure_copy(settings(models[0]), *folders, lambda progress: None, told.append) is None
    assert told[0].startswith("quality not measured: ") and "tokenizer.json" in told[0]
