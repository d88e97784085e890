"""Quantizing a model by name: settings and options in, a quantized model folder and its card out; for `quantize`."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model, is_hub_id
from salalocal.checkpoint.strict_json import one_line
from salalocal.device import pick_device
from salalocal.durable import replace_file
from salalocal.errors import CheckpointError, RequestError
from salalocal.quant.job import CARD_FILE, check_place
from salalocal.quant.quantizer import Quantizer, StepProgress
from salalocal.quant.recipe import GPTQ, RTN, QuantizeOptions, make_steps
from salalocal.session.start import Sources, Tell, read_config
from salalocal.session.texts import (
    CALIBRATION,
    DEFAULT_SEQUENCE_TOKENS,
    MIN_SEQUENCE_TOKENS,
    Ids,
    cut_sequences,
    file_text,
    shipped_text,
)
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings, models_folder

DEFAULT_CALIBRATION_TOKENS = 8 * DEFAULT_SEQUENCE_TOKENS
_MOST_PARAMETERS_ON_CPU = 200_000_000  # GPTQ then takes an hour or so on a few cores

Measure = Callable[[ModelFolder, ModelFolder], dict[str, Any] | None]
"""Holds a quantized copy (second) against its original and gives figures for the card, or None if it cannot."""


@dataclass(frozen=True)
class QuantizeRequest:
    """What to make. Units: calibration_tokens, the most to use of the text.

    `out` None is a folder named after the model, among the user's data.
    """

    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    out: Path | None = None
    calibration: Sources = field(default_factory=Sources)
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS

    def __post_init__(self) -> None:
        if self.calibration_tokens < MIN_SEQUENCE_TOKENS:
            raise RequestError(
                f"{self.calibration_tokens} tokens are too few to calibrate on",
                f"--calibration-tokens {MIN_SEQUENCE_TOKENS} or more",
            )


@dataclass(frozen=True)
class QuantizedModel:
    """The result: where it is, and its card."""

    folder: Path
    card: dict[str, Any]


def quantize_model(
    settings: Settings,
    request: QuantizeRequest,
    on_progress: Callable[[StepProgress], None],
    tell: Tell,
    measure: Measure | None = None,
) -> QuantizedModel:
    """Quantize the chosen model, or go on with it where an earlier run stopped; then measure what it has lost.

    The figures join the card of the finished folder, under `quality`; a folder that has them is not measured again.
    Their last digits may move with the number of threads; all else that is written does not.
    Raises: RequestError, HubError, CheckpointError, PackError, NumericError, BusyError, BackendError.
    """
    source = _find_original(settings.model)
    out = request.out or _default_out(settings.model, request.options)
    if out.absolute() == source.path.absolute():
        raise RequestError("--out is the folder of the model itself", "name another folder")
    check_place(out)
    make_steps(read_config(source), request.options)  # options that the model cannot have, before the text is read
    device = pick_device(settings.device)
    sequences = _calibration(source, request, tell)
    tell(f"result: {out}")
    quantizer = Quantizer(source, out, request.options, sequences, device=device)
    try:
        card = quantizer.run(on_progress)
        if measure is not None and "quality" not in card:
            quality = measure(source, ModelFolder(out))
            if quality is not None:
                card = {**card, "quality": quality}
                _write_card(out, card)
    except (KeyboardInterrupt, SystemExit):
        tell("stopped: the same command goes on from here")
        raise
    return QuantizedModel(out, card)


def usual_method(settings: Settings, tell: Tell) -> str:
    """The method for who names none: GPTQ, which loses least, where it takes minutes; else rounding to nearest.

    Raises: HubError, CheckpointError, RequestError, BackendError.
    """
    device = pick_device(settings.device)
    num_parameters = read_config(_find_original(settings.model)).num_parameters
    if device.type == "cuda" or num_parameters <= _MOST_PARAMETERS_ON_CPU:
        tell("method: gptq, which loses least")
        return GPTQ
    tell(f"method: rtn, since gptq would read its text through {num_parameters / 1e9:.1f} G parameters on a CPU")
    return RTN


def _find_original(model: str) -> ModelFolder:
    """The folder of a model that can be quantized. Raises: RequestError if it is quantized already; HubError."""
    source = find_model(model)
    if read_config(source).quantization_config is None:
        return source
    name = model if source.variant is None else model.rpartition(":")[0]
    variants = [ModelFolder(source.path, variant) for variant in source.variants]
    originals = [f"{name}:{found.variant}" for found in variants if read_config(found).quantization_config is None]
    hint = f"salalocal quantize --model {shlex.quote(originals[0])}" if originals else ""
    raise RequestError(f"model {one_line(model, 160)}: quantized already", hint or "name the model that it was made of")


def _default_out(model: str, options: QuantizeOptions) -> Path:
    name = model.replace("/", "--") if is_hub_id(model.partition(":")[0]) else Path(model).resolve().name
    return models_folder() / f"{name.replace(':', '-')}-{options.label}"


def _calibration(source: ModelFolder, request: QuantizeRequest, tell: Tell) -> list[Ids]:
    """The ids of the files as they stand in a prompt, or of the shipped texts, cut into sequences."""
    if not request.calibration.paths and request.options.method != GPTQ:
        return []
    codec = TextCodec.from_folder(source.path)
    if request.calibration.paths:
        text = file_text(request.calibration, codec, tell)
    else:
        text = shipped_text(CALIBRATION, codec)
    sequences = cut_sequences(text, DEFAULT_SEQUENCE_TOKENS, request.calibration_tokens)
    used = sum(map(len, sequences))
    tell(f"calibration: {used:,} of the {text.num_tokens:,} tokens of {text.name}")
    return sequences


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    data = (json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        replace_file(folder / CARD_FILE, lambda file: file.write(data))
    except OSError as error:
        raise CheckpointError(f"{folder / CARD_FILE}: cannot write: {error.strerror or error}") from error
