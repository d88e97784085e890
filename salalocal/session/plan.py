"""Does it fit, and what would: a model's shape and an amount of memory go in, a table comes out; for `plan`."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from salalocal.checkpoint.folder import stored_bytes
from salalocal.checkpoint.hub import find_model
from salalocal.engine.budget import (
    CacheFormat,
    MemoryPlan,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    check_length,
    fitted,
    longest_context,
    plan_memory,
    why_no_kernels,
)
from salalocal.errors import HubError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.session.start import model_choice, read_config
from salalocal.settings import Settings

CONTEXTS = tuple(2**power for power in range(14, 22))
CARD_BYTES = tuple(size * 2**30 for size in (8, 12, 16, 24, 32, 48, 80, 96, 141))
RELEASED_MODEL = "openbmb/MiniCPM-SALA"
_WEIGHTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
KV_PLACES = ("card", "host")
_LOCKABLE_SHARE = 0.9  # of the host memory that is free: what is locked cannot be swapped out for anything else
_MAX_ALTERNATIVES = 3
_ROUND_DOWN_TO = 1024


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. Units: ctx in tokens (None: no context in particular), memory in bytes.

    `host_bytes`: most that may be locked in host memory, None for any amount.
    """

    model: str
    ctx: int | None
    memory_bytes: int
    options: PlanOptions
    host_bytes: int | None = None

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether there is memory for a plan."""
        fits_host = self.host_bytes is None or plan.host_bytes <= self.host_bytes
        return fits_host and plan.total_bytes <= self.memory_bytes


@dataclass(frozen=True)
class PlanFlags:
    """What the user asks of a plan; None where nothing was said. Units: ctx in tokens, memory in bytes."""

    ctx: int | None = None
    memory_bytes: int | None = None
    weights: str | None = None
    cache: str | None = None
    kv_place: str | None = None


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
    memory_bytes, host_bytes, is_cuda = flags.memory_bytes, None, True
    if memory_bytes is None:
        memory_bytes, host_bytes, is_cuda = _memory_here(settings.device)
        tell(f"memory: {memory_bytes:,} bytes are free on this {'card' if is_cuda else 'machine (no card is used)'}")
    stored = _WEIGHTS[config.dtype] if quantized is None else quantized.weights.value
    weights = WeightFormat(_word("--weights", flags.weights or stored, _values(WeightFormat)))
    default_cache = "fp32" if weights is WeightFormat.FP32 else "bf16"
    cache = CacheFormat(_word("--kv-cache", flags.cache or default_cache, _values(CacheFormat)))
    if quantized is None or weights is not quantized.weights:
        config = replace(config, quantization_config=None)
    # What is quantized computes in the dtype of its other tensors.
    has_kernels = (weights is WeightFormat.BF16 or config.dtype == "bfloat16") and not why_no_kernels(config)
    options = PlanOptions(weights, cache, is_cuda=is_cuda, stored=quantized, has_kernels=has_kernels)
    options = placed(config, options, flags.kv_place)
    return make_plan(config, PlanRequest(settings.model, flags.ctx, memory_bytes, options, host_bytes))


def placed(config: SalaConfig, options: PlanOptions, kv_place: str | None) -> PlanOptions:
    """The options with keys and values in the place of that name; None: on the card, if there is one.

    Raises: RequestError for another name, or where keys and values cannot lie in host memory.
    """
    if kv_place is None or _word("--kv-place", kv_place, KV_PLACES) == "card":
        return options
    if not options.is_cuda:
        raise RequestError("--kv-place host is for cards: on a CPU everything is in host memory", "leave it out")
    if not options.is_fused:
        why = why_no_kernels(config) or "they take bfloat16, with plain or integer weights, and need Triton"
        raise RequestError(f"--kv-place host needs the kernels for cards, which do not take this model: {why}")
    return replace(options, is_kv_on_host=True)


def lockable_bytes() -> int:
    """How much host memory may be locked for a card at this moment."""
    import torch  # here, since it takes seconds

    from salalocal.device import device_memory

    return int(_LOCKABLE_SHARE * device_memory(torch.device("cpu")).free_bytes)


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


def _memory_here(device_name: str | None) -> tuple[int, int | None, bool]:
    """What is free, what may be locked beside it, and whether that is a card."""
    from salalocal.device import device_memory, pick_device  # here, since it imports torch

    device = pick_device(device_name)
    is_cuda = device.type == "cuda"
    return device_memory(device).free_bytes, lockable_bytes() if is_cuda else None, is_cuda


def _word(flag: str, word: str, words: Iterable[str]) -> str:
    known = list(words)
    if word not in known:
        raise RequestError(
            f"{flag} is {word[:40]!r}, not one of {', '.join(known)}", f"for example: {flag} {known[-1]}"
        )
    return word


def _values(words: type[Enum]) -> list[str]:
    return [member.value for member in words]


def make_plan(config: SalaConfig, request: PlanRequest) -> PlanReport:
    """Work out the table. Raises: RequestError for a context that makes no sense."""
    check_length(config, request.ctx or 0, request.options)
    lengths = sorted({*CONTEXTS, *([request.ctx] if request.ctx else [])})
    report = PlanReport(
        request,
        tuple(_planned(config, tokens, request) for tokens in lengths),
        longest_context(config, request.memory_bytes, request.options, request.host_bytes),
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
    """Commands that fit, the closest to what was asked first: a smaller cache, weights, keys and values in host memory,
    a shorter context, then a larger card."""
    ctx = request.ctx or _ROUND_DOWN_TO
    for choices in (_smaller_formats(request.options), _on_host(request.options)):
        fitting = (replace(request, ctx=ctx, options=options) for options in choices)
        found = next((each for each in fitting if each.holds(_planned(config, ctx, each))), None)
        if found is not None:
            yield _command(found)
    for options in (request.options, replace(request.options, weights=WeightFormat.INT4)):
        longest = longest_context(config, request.memory_bytes, options, request.host_bytes)
        tokens = longest // _ROUND_DOWN_TO * _ROUND_DOWN_TO
        if 0 < tokens < ctx:
            yield _command(replace(request, ctx=tokens, options=options))
            break
    for card_bytes in CARD_BYTES:
        larger = replace(request, ctx=ctx, memory_bytes=card_bytes)
        if card_bytes > request.memory_bytes and larger.holds(_planned(config, ctx, larger)):
            yield _command(larger)
            break


def _smaller_formats(options: PlanOptions) -> Iterator[PlanOptions]:
    for weights, cache in (
        (options.weights, CacheFormat.INT8),
        (WeightFormat.INT4, options.cache),
        (WeightFormat.INT4, CacheFormat.INT8),
    ):
        yield replace(options, weights=weights, cache=cache)


def _on_host(options: PlanOptions) -> Iterator[PlanOptions]:
    """With keys and values in host memory, which not every model can have there."""
    for smaller in (options, *_smaller_formats(options)):
        if smaller.is_fused and not options.is_kv_on_host:
            yield replace(smaller, is_kv_on_host=True)


def _command(request: PlanRequest) -> str:
    words = ["salalocal", "plan", request.model]
    if request.ctx is not None:
        words += ["--ctx", short_tokens(request.ctx)]
    words += ["--gpu-memory", _short_bytes(request.memory_bytes)]
    words += ["--weights", request.options.weights.value, "--kv-cache", request.options.cache.value]
    if request.options.is_kv_on_host:
        words += ["--kv-place", "host"]
    return shlex.join(words)


def short_tokens(tokens: int) -> str:
    """A number of tokens as --ctx takes it: 64k, 1m, 65537."""
    for unit, name in ((2**20, "m"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def _short_bytes(num_bytes: int) -> str:
    return f"{num_bytes // 2**30}g" if num_bytes % 2**30 == 0 else str(num_bytes)
