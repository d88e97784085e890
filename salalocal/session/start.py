"""From settings and paths to an open session, in the order that fails early; for the commands of cli.

Files are read first (no text: the model is not loaded), then tokens are counted, then memory is checked, and only
then torch loads the weights. What happens is told line by line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO

from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model, is_builtin
from salalocal.checkpoint.names import CONFIG_FILE, MAX_CONFIG_BYTES
from salalocal.checkpoint.strict_json import read_json_file
from salalocal.model.config import SalaConfig
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import PackLimits, Reading, read_sources
from salalocal.prompt.sources.limits import size_text
from salalocal.prompt.visible import quoted_name
from salalocal.session.tokens import (
    QUESTION_TOKENS,
    ContextOverflow,
    TextCodec,
    TokenReport,
    answer_room,
    default_max_tokens,
)
from salalocal.settings import DEFAULT_ORIGIN, Settings

if TYPE_CHECKING:
    from salalocal.engine.sampling_params import SamplingParams
    from salalocal.session.runtime import Runtime
    from salalocal.session.session import Session

Tell = Callable[[str], None]

BUILTIN_TRAINED_TOKENS = 16_384  # the longest context that the built-in model saw in training, and was scored at

_SKIPS_SHOWN = 20


@dataclass(frozen=True)
class Sources:
    """What to read: paths as typed (`-` is stdin), the order and the caps."""

    paths: tuple[str, ...] = ()
    order: str = "auto"
    limits: PackLimits = field(default_factory=PackLimits)
    stdin: BinaryIO | None = None


@dataclass(frozen=True)
class OpenSession:
    """A session with what it was made of."""

    session: "Session"
    runtime: "Runtime"
    reading: Reading

    def token_report(self) -> TokenReport:
        """The documents with their tokens, and what was skipped."""
        report = self.session.token_report()
        return replace(report, skips=self.reading.skips, notes=self.reading.notes)


def model_choice(settings: Settings) -> str:
    """The chosen model with the reason, as a line to show."""
    origin = settings.origin("model")
    if origin == DEFAULT_ORIGIN:
        return f"model: {settings.model} (no --model, SALALOCAL_MODEL or setting)"
    usual = origin.removeprefix(f"{DEFAULT_ORIGIN}: ")  # as session.usual_model says it
    return f"model: {settings.model} ({usual if usual != origin else f'from {origin}'})"


def read_config(folder: ModelFolder) -> SalaConfig:
    """The shape of a model, without its weights. Raises: CheckpointError."""
    return SalaConfig.from_hf(read_json_file(folder.file(CONFIG_FILE), MAX_CONFIG_BYTES))


def tell_skips(reading: Reading, tell: Tell) -> None:
    """Tell what was not read and why."""
    for skip in reading.skips[:_SKIPS_SHOWN]:
        tell(f"skipped {quoted_name(skip.path)}: {skip.reason}")
    if len(reading.skips) > _SKIPS_SHOWN:
        tell(f"skipped {len(reading.skips) - _SKIPS_SHOWN:,} more; `salalocal tokens` with the same -f lists all")
    for note in reading.notes:
        tell(note)


def open_session(settings: Settings, sources: Sources, stop: Sequence[str], tell: Tell) -> OpenSession:
    """Read the files, choose and load the model, check that everything fits, and open a session.

    Raises: PackError, HubError, CheckpointError, ContextError, MemoryBudgetError, BackendError, RequestError.
    """
    sampling = _sampling(settings)  # a value that makes no sense is refused before anything is read
    reading, pack = Reading(()), None
    if sources.paths:
        reading = read_sources(sources.paths, sources.limits, sources.stdin)
        pack = PromptPack.build(reading, sources.order)
        tell_skips(reading, tell)
    tell(model_choice(settings))
    if settings.ctx is not None:
        tell(f"context: at most {settings.ctx:,} tokens (from {settings.origin('ctx')})")
    folder = find_model(settings.model)
    codec = TextCodec.from_folder(folder.path)
    report = codec.report(pack, settings.system)
    if pack is not None:
        tell(f"{_reading_line(reading)}, {report.total_tokens:,} tokens")
    made_for = read_config(folder).max_position_embeddings
    limit = settings.ctx or made_for
    if made_for is not None and limit is not None and limit > made_for:
        tell(f"the model was made for contexts of up to {made_for:,} tokens")
    if limit is not None and report.total_tokens >= limit:
        raise ContextOverflow(report, limit)
    from salalocal.kernels.backend import on_first_compile  # here, since they import torch
    from salalocal.session.runtime import LoadOptions, open_runtime

    num_tokens = report.total_tokens + QUESTION_TOKENS + answer_room(sampling.max_tokens)
    options = LoadOptions.of(settings, num_tokens)
    runtime = open_runtime(folder, settings.model, options, codec)
    if runtime.engine.device.type == "cuda":
        tell(runtime.placement)
        on_first_compile(lambda: tell("compiling kernels for this card, which later starts need not do"))
    elif settings.math is not None:
        tell(f"--math {settings.math} is for cards; this run uses {runtime.engine.device}")
    if is_builtin(settings.model):
        tell(
            f"built-in demonstration model, {runtime.config.num_parameters / 1e6:.1f} M parameters: "
            "looks things up in files, cannot chat or reason"
        )
        if report.total_tokens > BUILTIN_TRAINED_TOKENS:
            tell(
                f"it was trained on up to {BUILTIN_TRAINED_TOKENS:,} tokens: "
                "measured up to 64K it answers as well, at 256K one answer in three is wrong"
            )
    session = runtime.session(
        pack=pack,
        system=settings.system,
        sampling=sampling,
        stop=stop,
        context_limit=limit,
    )
    return OpenSession(session, runtime, reading)


def report_sources(settings: Settings, sources: Sources, tell: Tell) -> TokenReport:
    """Count the tokens of files with the tokenizer of the chosen model, without loading the model.

    Raises: PackError, HubError, CheckpointError, RequestError.
    """
    reading = read_sources(sources.paths, sources.limits, sources.stdin)
    pack = PromptPack.build(reading, sources.order)
    tell(model_choice(settings))
    report = TextCodec.from_folder(find_model(settings.model).path).report(pack, settings.system)
    return replace(report, skips=reading.skips, notes=reading.notes)


def _sampling(settings: Settings) -> "SamplingParams":
    from salalocal.engine.sampling_params import SamplingParams

    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_tokens=settings.max_tokens or default_max_tokens(settings.model),
        seed=settings.seed,
    )


def _reading_line(reading: Reading) -> str:
    num_bytes = sum(document.num_bytes for document in reading.documents)
    files = f"{len(reading.documents):,} files" if len(reading.documents) != 1 else "1 file"
    skipped = f", skipped {len(reading.skips):,}" if reading.skips else ""
    return f"found {files}, {size_text(num_bytes)}{skipped}"
