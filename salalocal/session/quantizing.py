"""Quantizing a model by name: settings and options in, a quantized model folder and its card out; for `quantize`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from salalocal.checkpoint.hub import is_hub_id, resolve_model
from salalocal.errors import RequestError
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import read_sources
from salalocal.prompt.template import Conversation
from salalocal.quant.calibration import DEFAULT_SEQUENCE_TOKENS, cut_sequences
from salalocal.quant.quantizer import Quantizer, StepProgress
from salalocal.quant.recipe import QuantizeOptions
from salalocal.session.start import Sources, Tell, model_choice, tell_skips
from salalocal.session.tokens import TextCodec
from salalocal.settings import APPLICATION, Settings

DEFAULT_CALIBRATION_TOKENS = 8 * DEFAULT_SEQUENCE_TOKENS


@dataclass(frozen=True)
class QuantizeRequest:
    """What to make. Units: calibration_tokens, the most to use of the text.

    `out` None is a folder named after the model, among the user's data.
    """

    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    out: Path | None = None
    calibration: Sources = field(default_factory=Sources)
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS


@dataclass(frozen=True)
class QuantizedModel:
    """The result: where it is, and its card."""

    folder: Path
    card: dict[str, Any]


def quantize_model(
    settings: Settings, request: QuantizeRequest, on_progress: Callable[[StepProgress], None], tell: Tell
) -> QuantizedModel:
    """Quantize the chosen model, or go on with it where an earlier run stopped.

    Raises: RequestError, HubError, CheckpointError, PackError, NumericError, BusyError.
    """
    tell(model_choice(settings))
    folder = resolve_model(settings.model)
    out = request.out or _default_out(settings.model, request.options)
    if out.absolute() == folder.absolute():
        raise RequestError("--out is the folder of the model itself", "name another folder")
    sequences = _calibration(folder, request, tell) if request.calibration.paths else []
    tell(f"result: {out}")
    card = Quantizer(folder, out, request.options, sequences).run(on_progress)
    return QuantizedModel(out, card)


def _default_out(model: str, options: QuantizeOptions) -> Path:
    name = model.replace("/", "--") if is_hub_id(model) else Path(model).resolve().name
    models = platformdirs.user_data_path(APPLICATION, appauthor=False) / "models"
    return models / f"{name}-int{options.bits}-g{options.group_size}-{options.method}"


def _calibration(folder: Path, request: QuantizeRequest, tell: Tell) -> list[tuple[int, ...]]:
    """The ids of the files as they stand in a prompt, cut into sequences."""
    sources = request.calibration
    reading = read_sources(sources.paths, sources.limits, sources.stdin)
    tell_skips(reading, tell)
    pack = PromptPack.build(reading, sources.order)
    segments = TextCodec.from_folder(folder).template.render(Conversation(None, pack))
    ids = [token for segment in segments for token in segment.ids]
    used = ids[: request.calibration_tokens]
    tell(f"calibration: {len(used):,} of the {len(ids):,} tokens of {len(reading.documents):,} files")
    return cut_sequences(used)
