"""Which model is measured, and opening it: settings come in, a subject goes out; for `run`."""

from collections.abc import Mapping
from math import prod

import torch

from salalocal.bench.random_weights import random_dtype, random_engine, random_layout
from salalocal.bench.subject import EngineSubject, SubjectFacts
from salalocal.bench.work import SalaCost
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model, is_builtin
from salalocal.device import device_memory
from salalocal.engine.budget import (
    CUDA_DRIVER_BYTES,
    CacheFormat,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    check_length,
    check_lockable,
    fitted,
    longest_context,
    plan_memory,
)
from salalocal.engine.engine import Engine
from salalocal.engine.load import Placement
from salalocal.errors import HubError, MemoryBudgetError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.quant import weight_layout
from salalocal.quant.int4 import IntScheme
from salalocal.quant.layout import WeightLayout
from salalocal.quant.linear import KernelLinear
from salalocal.session.memory import naming_memory_errors
from salalocal.session.plan import RELEASED_MODEL, lockable_bytes, placed, short_tokens
from salalocal.session.runtime import DTYPES, LoadOptions, cache_named, engine_config, math_named, open_runtime
from salalocal.session.start import Tell, model_choice
from salalocal.session.usual_model import with_usual_model
from salalocal.settings import DEFAULT_ORIGIN, Settings

_SCALE_BYTES = 2
_ROUND_DOWN_TO = 1024
_HOST_NOTE = "keys and values lie in host memory; shares of the roofline count them as if the card held them"


def find_subject(settings: Settings, device: torch.device, tell: Tell) -> tuple[Settings, ModelFolder | None]:
    """The settings with the model to measure, and its folder; None for random weights of the released shape.

    Those are taken if nobody names a model and there is none here to chat with on this card, and in the place of the
    released model if that is not here. On a CPU nobody's choice is the built-in model.
    Raises: HubError for another model that is not here.
    """
    if settings.origin("model") == DEFAULT_ORIGIN and device.type == "cuda":
        usual = with_usual_model(settings, lambda line: None)
        if is_builtin(usual.model):
            tell("model: random int4 weights of the released 9B shape, since no larger model is here for this card")
            return settings, None
        settings = usual
    try:
        folder = find_model(settings.model)
    except HubError:
        if settings.model != RELEASED_MODEL:
            raise
        tell(f"model: random int4 weights of the released 9B shape, since {settings.model} is not on this machine")
        return settings, None
    tell(model_choice(settings))
    return settings, folder


def open_subject(folder: ModelFolder | None, settings: Settings, device: torch.device, capacity: int) -> EngineSubject:
    """A model with memory for `capacity` tokens beside it.

    Raises: MemoryBudgetError, CheckpointError, BackendError, RequestError.
    """
    if folder is None:
        return _random_subject(settings, device, capacity)
    engine = open_runtime(folder, settings.model, LoadOptions.of(settings, capacity)).engine
    checkpoint = Checkpoint.open(folder)
    record = checkpoint.config.quantization_config
    weights = _dtype_name(engine.model.dtype) if record is None else WeightFormat.of_record(record).value
    size = checkpoint.config.num_parameters
    about = f"{size / 1e9:.1f} B" if size >= 10**9 else f"{size / 1e6:.1f} M"
    layout = weight_layout(checkpoint)
    return _subject(engine, layout, settings.model, f"{settings.model}, {about} parameters, {weights}")


def _random_subject(settings: Settings, device: torch.device, capacity: int) -> EngineSubject:
    is_cuda = device.type == "cuda"
    if settings.dtype is not None and DTYPES.get(settings.dtype) is not random_dtype(device):
        raise RequestError(
            f"--dtype {settings.dtype[:40]!r}: random weights compute in {_dtype_name(random_dtype(device))} here",
            "leave it out, or name a model that is on this machine",
        )
    cache = CacheFormat.BF16 if is_cuda else CacheFormat.FP32
    if settings.kv_cache is not None:
        cache = cache_named(settings.kv_cache, cache)
    config = SalaConfig.released()
    layout = random_layout(config, device)
    options = PlanOptions(
        WeightFormat.INT4,
        cache,
        is_cuda=is_cuda,
        math=math_named(settings.math),
        stored=StoredWeights(WeightFormat.INT4, sum(tensor_bytes(layout, torch.bfloat16).values())),
    )
    options = placed(config, options, settings.kv_place)
    free = device_memory(device).free_bytes + (CUDA_DRIVER_BYTES if is_cuda else 0)  # the context is there already
    options = fitted(config, capacity, free, options, settings.chunk_size)
    needed = _checked_bytes(config, capacity, options, free)
    with naming_memory_errors("making random weights"):
        placement = Placement(options.math, options.is_embedding_on_host)
        engine = random_engine(config, layout, device, placement, engine_config(options, settings.guess))
    return _subject(engine, layout, "random", "released shape, 9.5 B parameters, random int4 weights", needed)


def _checked_bytes(config: SalaConfig, capacity: int, options: PlanOptions, free: int) -> int:
    """What a run takes of the device. Raises: MemoryBudgetError if that, or what it locks on the host, is not free."""
    check_length(config, capacity, options)
    plan, lockable = plan_memory(config, capacity, options), lockable_bytes() if options.is_cuda else 0
    if plan.total_bytes > free:
        longest = longest_context(config, free, options, lockable) // _ROUND_DOWN_TO * _ROUND_DOWN_TO
        raise MemoryBudgetError(
            f"{capacity:,} tokens need {plan.total_bytes / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            f"salalocal bench --ctx {short_tokens(longest)}" if longest else "salalocal bench --model builtin",
        )
    check_lockable(plan, lockable)
    return plan.total_bytes


def _subject(
    engine: Engine, layout: WeightLayout, name: str, description: str, planned_bytes: int | None = None
) -> EngineSubject:
    config, dtype = engine.model.config, engine.model.dtype
    is_int8 = engine.config.is_cache_int8
    item_bytes = 1 + _SCALE_BYTES / config.sparse.head_dim if is_int8 else float(dtype.itemsize)
    cost = SalaCost(config, tensor_bytes(layout, dtype), item_bytes, float(dtype.itemsize))
    facts = SubjectFacts(
        name=name,
        description=description,
        num_parameters=config.num_parameters,
        model_bytes=cost.model_bytes,
        dtype=_dtype_name(dtype),
        math=_math_of(engine),
        cache="int8" if is_int8 else _dtype_name(dtype),
        chunk_size=engine.config.chunk_size,
        planned_bytes=planned_bytes,
        notes=(_HOST_NOTE,) if engine.config.is_kv_on_host else (),
    )
    return EngineSubject(engine, facts, cost)


def tensor_bytes(layout: WeightLayout, dtype: torch.dtype) -> Mapping[str, int]:
    """Bytes as loaded of every tensor of a checkpoint, packed ones with their scales, by its unpacked name."""
    sizes = {name: prod(spec.shape) * dtype.itemsize for name, spec in layout.dense.items()}
    for module, matrix in layout.matrices.items():
        num_out, num_in = matrix.shape
        scheme = matrix.scheme
        if isinstance(scheme, IntScheme):
            codes = num_out * num_in * scheme.bits // 8
            sizes[f"{module}.weight"] = codes + _SCALE_BYTES * num_out * scheme.num_groups(num_in)
        else:
            sizes[f"{module}.weight"] = matrix.num_bytes
    return sizes


def _math_of(engine: Engine) -> str:
    """What linear maps are multiplied in: what a module with a choice says, else the dtype of the model."""
    chosen = {module.math for module in engine.model.modules() if isinstance(module, KernelLinear)}
    return str(chosen.pop()) if chosen else _dtype_name(engine.model.dtype)


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
