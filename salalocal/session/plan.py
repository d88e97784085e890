"""Does it fit, and what would: a model's shape and an amount of memory go in, a table comes out; for `plan`."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from salalocal.checkpoint.folder import stored_bytes
from salalocal.checkpoint.hub import find_model
from salalocal.engine.budget import (
    MAX_CONTEXT_TOKENS,
    CacheFormat,
    MemoryPlan,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    fitted,
    longest_context,
    plan_memory,
)
from salalocal.errors import HubError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.session.start import model_choice, read_config
from salalocal.settings import Settings

CONTEXTS = tuple(2**power for power in range(14, 22))
CARD_BYTES = tuple(size * 2**30 for size in (8, 12, 16, 24, 32, 48, 80, 96, 141))
RELEASED_MODEL = "openbmb/MiniCPM-SALA"
_WEIGHTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_MAX_ALTERNATIVES = 3
_ROUND_DOWN_TO = 1024


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. Units: ctx in tokens (None: no context in particular), memory in bytes."""

    model: str
    ctx: int | None
    memory_bytes: int
    options: PlanOptions


@dataclass(frozen=True)
class PlanFlags:
    """What the user asks of a plan; None where nothing was said. Units: ctx in tokens, memory in bytes."""

    ctx: int | None = None
    memory_bytes: int | None = None
    weights: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class PlanReport:
    """The plans by context length, the longest context that fits, and commands that do fit if the asked one does not.

    `fits` says whether the asked context does, or any at all if none was asked for.
    """

    request: PlanRequest
    plans: tuple[MemoryPlan, ...]
    longest_tokens: int
    max_tokens: int | None
    alternatives: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if the asked context fits."""
        return self.longest_tokens >= max(1, self.request.ctx or 1)


def plan_model(settings: Settings, flags: PlanFlags, tell: Callable[[str], None]) -> PlanReport:
    """Plan for the chosen model on a card of the given memory, or on the device that is here.

    Raises: HubError, CheckpointError, RequestError, BackendError.
    """
    tell(model_choice(settings))
    config, quantized = _find_model(settings.model, tell)
    memory_bytes, is_cuda = flags.memory_bytes, True
    if memory_bytes is None:
        memory_bytes, is_cuda = _memory_here(settings.device)
        tell(f"memory: {memory_bytes:,} bytes are free on this {'card' if is_cuda else 'machine (no card is used)'}")
    stored = _WEIGHTS[config.dtype] if quantized is None else quantized.weights.value
    weights = WeightFormat(_word("--weights", flags.weights or stored, WeightFormat))
    default_cache = "fp32" if weights is WeightFormat.FP32 else "bf16"
    cache = CacheFormat(_word("--kv-cache", flags.cache or default_cache, CacheFormat))
    # What is quantized computes in the dtype of its other tensors.
    has_kernels = weights is WeightFormat.BF16 or config.dtype == "bfloat16"
    options = PlanOptions(weights, cache, is_cuda=is_cuda, stored=quantized, has_kernels=has_kernels)
    return make_plan(config, PlanRequest(settings.model, flags.ctx, memory_bytes, options))


def _find_model(model: str, tell: Callable[[str], None]) -> tuple[SalaConfig, StoredWeights | None]:
    """The shape of a model, and its weights if they are quantized."""
    try:
        folder = find_model(model)
    except HubError:
        if model != RELEASED_MODEL:
            raise
        tell(f"{model} is not on this machine: this plan is for its released shape")
        return SalaConfig.released(), None
    config = read_config(folder)
    record = config.quantization_config
    if record is None:
        return config, None
    return config, StoredWeights(WeightFormat.of_record(record), stored_bytes(folder))


def _memory_here(device_name: str | None) -> tuple[int, bool]:
    from salalocal.device import device_memory, pick_device  # here, since it imports torch

    device = pick_device(device_name)
    return device_memory(device).free_bytes, device.type == "cuda"


def _word(flag: str, word: str, words: type[Enum]) -> str:
    known = [member.value for member in words]
    if word not in known:
        raise RequestError(
            f"{flag} is {word[:40]!r}, not one of {', '.join(known)}", f"for example: {flag} {known[-1]}"
        )
    return word


def make_plan(config: SalaConfig, request: PlanRequest) -> PlanReport:
    """Work out the table. Raises: RequestError for a context that makes no sense."""
    if request.ctx is not None and request.ctx > MAX_CONTEXT_TOKENS:
        raise RequestError(f"--ctx {request.ctx:,} is more than {MAX_CONTEXT_TOKENS:,} tokens", "try --ctx 1m")
    lengths = sorted({*CONTEXTS, *([request.ctx] if request.ctx else [])})
    report = PlanReport(
        request,
        tuple(_planned(config, tokens, request) for tokens in lengths),
        longest_context(config, request.memory_bytes, request.options),
        config.max_position_embeddings,
        (),
    )
    if report.fits:
        return report
    return replace(report, alternatives=tuple(_alternatives(config, request))[:_MAX_ALTERNATIVES])


def _planned(config: SalaConfig, num_tokens: int, request: PlanRequest) -> MemoryPlan:
    """The plan of a run on that much memory, which chooses its chunks by it."""
    return plan_memory(config, num_tokens, fitted(config, num_tokens, request.memory_bytes, request.options))


def _alternatives(config: SalaConfig, request: PlanRequest) -> Iterator[str]:
    """Commands that fit, the closest to what was asked first: a smaller cache, weights, context, then a larger card."""
    ctx = request.ctx or _ROUND_DOWN_TO
    for weights, cache in _smaller_formats(request.options):
        options = replace(request.options, weights=weights, cache=cache)
        if _planned(config, ctx, replace(request, options=options)).total_bytes <= request.memory_bytes:
            yield _command(replace(request, ctx=ctx, options=options))
            break
    for options in (request.options, replace(request.options, weights=WeightFormat.INT4)):
        tokens = longest_context(config, request.memory_bytes, options) // _ROUND_DOWN_TO * _ROUND_DOWN_TO
        if 0 < tokens < ctx:
            yield _command(replace(request, ctx=tokens, options=options))
            break
    for card_bytes in CARD_BYTES:
        needed = _planned(config, ctx, replace(request, memory_bytes=card_bytes)).total_bytes
        if card_bytes >= needed and card_bytes > request.memory_bytes:
            yield _command(replace(request, ctx=ctx, memory_bytes=card_bytes))
            break


def _smaller_formats(options: PlanOptions) -> Iterator[tuple[WeightFormat, CacheFormat]]:
    yield options.weights, CacheFormat.INT8
    yield WeightFormat.INT4, options.cache
    yield WeightFormat.INT4, CacheFormat.INT8


def _command(request: PlanRequest) -> str:
    words = ["salalocal", "plan", request.model]
    if request.ctx is not None:
        words += ["--ctx", short_tokens(request.ctx)]
    words += ["--gpu-memory", _short_bytes(request.memory_bytes)]
    words += ["--weights", request.options.weights.value, "--kv-cache", request.options.cache.value]
    return shlex.join(words)


def short_tokens(tokens: int) -> str:
    """A number of tokens as --ctx takes it: 64k, 1m, 65537."""
    for unit, name in ((2**20, "m"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def _short_bytes(num_bytes: int) -> str:
    return f"{num_bytes // 2**30}g" if num_bytes % 2**30 == 0 else str(num_bytes)
