"""A quantized model folder held against its original: names and texts in, a `Comparison` out; for `eval divergence`
and for the card that `quantize` writes.

The two are loaded one after the other, in one dtype on one device, so a comparison takes hardly more memory than the
larger of them alone.
"""

import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model
from salalocal.device import pick_device
from salalocal.engine.load import MAX_DEFAULT_FLOAT32_BYTES
from salalocal.errors import CheckpointError, MemoryBudgetError, RequestError
from salalocal.evals.divergence import Divergence, OnTokens, Sequences, compare, read_reference
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.session.memory import naming_memory_errors
from salalocal.session.runtime import LoadOptions, Runtime, open_runtime
from salalocal.session.start import Sources, Tell, model_choice, read_config
from salalocal.session.texts import (
    DEFAULT_SEQUENCE_TOKENS,
    EVALUATION,
    EVALUATION_TOKENS,
    MIN_SEQUENCE_TOKENS,
    TokenText,
    cut_sequences,
    digest,
    file_text,
    shipped_text,
)
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings


@dataclass(frozen=True)
class EvalProgress:
    """How far a comparison is. Units: tokens of both models together; seconds since the first one."""

    model: str
    num_tokens: int
    total_tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class DivergenceRequest:
    """What to compare with, and on what; no sources means the shipped text. Units: tokens of a sequence and in all."""

    against: str
    sources: Sources = field(default_factory=Sources)
    sequence_tokens: int = DEFAULT_SEQUENCE_TOKENS
    max_tokens: int = EVALUATION_TOKENS

    def __post_init__(self) -> None:
        for flag, value in (("--ctx", self.sequence_tokens), ("--tokens", self.max_tokens)):
            if value < MIN_SEQUENCE_TOKENS:
                raise RequestError(f"{flag} {value} is too short to evaluate on", f"{flag} {MIN_SEQUENCE_TOKENS}")


@dataclass(frozen=True)
class Comparison:
    """The figures, and what they were measured on and with. Units: sequence_tokens, what a sequence has at most."""

    text: str
    text_sha256: str
    sequence_tokens: int
    dtype: str
    device: str
    divergence: Divergence

    def to_json(self) -> dict[str, Any]:
        """Plain data, on one level."""
        plain = asdict(self)
        figures: dict[str, Any] = plain.pop("divergence")
        return plain | figures


def compare_by_name(
    settings: Settings, request: DivergenceRequest, on_progress: Callable[[EvalProgress], None], tell: Tell
) -> Comparison:
    """Hold the model `request.against` against the chosen one.

    Raises: RequestError, HubError, CheckpointError, PackError, MemoryBudgetError, BackendError, NumericError.
    """
    tell(model_choice(settings))
    original, quantized = find_model(settings.model), find_model(request.against)
    if (original.path.resolve(), original.variant) == (quantized.path.resolve(), quantized.variant):
        tell("both are the same model: it is compared with itself")
    codec = TextCodec.from_folder(original.path)
    if request.sources.paths:
        text = file_text(request.sources, codec, tell)
    else:
        text = shipped_text(EVALUATION, codec)
    return _compare(settings, (original, quantized), (text, request), on_progress, tell)


def measure_copy(
    settings: Settings,
    original: ModelFolder,
    quantized: ModelFolder,
    on_progress: Callable[[EvalProgress], None],
    tell: Tell,
) -> dict[str, Any] | None:
    """The figures of a quantized copy on the shipped evaluation text, for its card.

    None where there is no tokenizer, and if they would take too long or do not fit into memory; why, and which command
    measures them, is told. Raises: CheckpointError, BackendError, NumericError.
    """
    reason = _obstacle(settings, original)
    if reason is None:
        request, codec = DivergenceRequest(str(quantized)), TextCodec.from_folder(original.path)
        text = shipped_text(EVALUATION, codec)
        try:
            return _compare(settings, (original, quantized), (text, request), on_progress, tell).to_json()
        except MemoryBudgetError as error:
            reason = error.message
    names = f"--model {shlex.quote(settings.model)} --against {shlex.quote(str(quantized))}"
    tell(f"quality not measured: {reason}")
    tell(f"to measure it: salalocal eval divergence {names}")
    return None


def _obstacle(settings: Settings, model: ModelFolder) -> str | None:
    """Why a copy of this model should not be measured unasked, if there is a reason."""
    num_parameters = read_config(model).num_parameters
    is_cpu = pick_device(settings.device).type == "cpu"
    if is_cpu and 4 * num_parameters > MAX_DEFAULT_FLOAT32_BYTES:
        return f"it takes long on a CPU for {num_parameters / 1e9:.1f} G parameters"
    try:
        TextCodec.from_folder(model.path)
    except CheckpointError as error:  # weights can be quantized without a tokenizer
        return error.message
    return None


def _compare(
    settings: Settings,
    models: tuple[ModelFolder, ModelFolder],
    what: tuple[TokenText, DivergenceRequest],
    on_progress: Callable[[EvalProgress], None],
    tell: Tell,
) -> Comparison:
    text, request = what
    _check_same_vocabulary(*models)
    sequences = cut_sequences(text, request.sequence_tokens, request.max_tokens)
    used = sum(map(len, sequences))
    pieces = "1 sequence" if len(sequences) == 1 else f"{len(sequences):,} sequences"
    tell(f"evaluating on {used:,} of the {text.num_tokens:,} tokens of {text.name}, in {pieces}")
    meter = _Meter(2 * used, on_progress)
    first = _open(settings, models[0], settings.dtype, sequences)
    dtype, device = first.engine.model.dtype, first.engine.device
    with naming_memory_errors("evaluating the original model"):
        reference = read_reference(first.engine, sequences, meter.of("original"))
    first.engine.keep_head()
    second = _open(settings, models[1], dtype, sequences)
    with naming_memory_errors("evaluating the quantized model"):
        divergence = compare(reference, second.engine, meter.of("quantized"))
    return Comparison(
        text=text.name,
        text_sha256=digest(sequences),
        sequence_tokens=request.sequence_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        divergence=divergence,
    )


def _open(settings: Settings, model: ModelFolder, dtype: str | torch.dtype | None, sequences: Sequences) -> Runtime:
    longest = max(map(len, sequences))
    return open_runtime(model, str(model), replace(LoadOptions.of(settings, longest), dtype=dtype))


def _check_same_vocabulary(original: ModelFolder, quantized: ModelFolder) -> None:
    """Raises: CheckpointError unless equal ids mean equal text in both models."""
    sizes = [read_config(model).vocab_size for model in (original, quantized)]
    tokenizers = [Tokenizer.from_folder(model.path) for model in (original, quantized)]
    if sizes[0] == sizes[1] and _pieces(tokenizers[0]) == _pieces(tokenizers[1]):
        return
    differ = "equal ids mean other texts" if sizes[0] == sizes[1] else f"{sizes[1]:,} and {sizes[0]:,} tokens"
    raise CheckpointError(
        f"{quantized} and {original} have different vocabularies: {differ}",
        "compare a model with a quantized copy of it",
    )


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.piece_bytes(token, skip_control=False) for token in range(tokenizer.vocab_size)]


class _Meter:
    """Counts tokens over both models and reports them."""

    def __init__(self, total_tokens: int, on_progress: Callable[[EvalProgress], None]) -> None:
        self._total_tokens = total_tokens
        self._on_progress = on_progress
        self._num_tokens = 0
        self._started_s = time.monotonic()

    def of(self, model: str) -> OnTokens:
        def add(num_tokens: int) -> None:
            self._num_tokens += num_tokens
            elapsed_s = time.monotonic() - self._started_s
            self._on_progress(EvalProgress(model, self._num_tokens, self._total_tokens, elapsed_s))

        return add
