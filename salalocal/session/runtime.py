"""A model opened once: config, tokenizer, template and engine; for programs (`salalocal.load`), sessions and cli."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import BUILTIN, find_model
from salalocal.device import device_memory, pick_device
from salalocal.engine.budget import (
    CUDA_DRIVER_BYTES,
    CacheFormat,
    Math,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    check_fits,
    check_length,
    check_lockable,
    fitted,
    plan_memory,
    why_no_kernels,
)
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.load import Placement, default_dtype, load_model, weight_bytes
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import CheckpointError, ContextError, RequestError
from salalocal.kernels.backend import HAS_TRITON
from salalocal.model.config import SalaConfig
from salalocal.model.sala import MODEL_DTYPES
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import read_sources
from salalocal.prompt.text_stream import TextStream
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.quant.linear import DEFAULT_MATH
from salalocal.session.generation import Generation
from salalocal.session.memory import naming_memory_errors
from salalocal.session.plan import PlanRequest, lockable_bytes, make_plan, placed
from salalocal.session.session import Session, SessionOptions, one_or_more
from salalocal.session.tokens import BUILTIN_MAX_TOKENS, TextCodec, answer_room, default_max_tokens
from salalocal.settings import Settings

DTYPES = MODEL_DTYPES | {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class Runtime:
    """A model with everything that text needs to reach it. Never two calls at once."""

    name: str
    config: SalaConfig
    codec: TextCodec
    engine: Engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.codec.tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_ids)

    @property
    def placement(self) -> str:
        """Where and how it runs, in words."""
        config, model = self.engine.config, self.engine.model
        cache = "int8" if config.is_cache_int8 else str(model.dtype).removeprefix("torch.")
        place = ", in host memory" if config.is_kv_on_host else ""
        words = [f"{config.chunk_size:,} tokens at a time", f"keys and values in {cache}{place}"]
        if model.model.embed_tokens.weight.device.type != model.device.type:
            words.append("embedding table in host memory")
        return f"runs on {model.device}: {', '.join(words)}"

    @property
    def context_limit(self) -> int | None:
        """How many tokens the model was made for, if it says so."""
        return self.config.max_position_embeddings

    def logits(self, ids: Sequence[int] | Tensor, chunk_size: int | None = None) -> Tensor:
        """The logits of every token of a text, for evaluation.

        Shapes: ids [T] -> fp32 [T, vocab] on the CPU. Units: chunk_size in tokens; it does not change the result
        beyond rounding. Raises: RequestError, MemoryBudgetError, NumericError.
        """
        with naming_memory_errors("computing logits"):
            return self.engine.logits(ids, chunk_size)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = BUILTIN_MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Go on from a prompt, as raw completion: no chat template, no documents.

        A text is encoded as plain text behind the start token (BOS), so that nothing in it becomes a control token;
        token ids are used as they are. The prompt is read before this returns; iterate for the text.
        Raises: RequestError, ContextError, NumericError.
        """
        params = SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, seed=seed
        )
        stream = TextStream(self.tokenizer, stop, continues_text=True)
        ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RequestError("the prompt is empty", "give a text or at least one token id")
        if self.context_limit is not None and len(ids) >= self.context_limit:
            raise ContextError(
                f"a prompt of {len(ids):,} tokens does not fit a context of {self.context_limit:,} tokens"
            )
        with naming_memory_errors("reading the prompt"):
            state = self.engine.new_state(len(ids) + answer_room(max_tokens))
            logits = self.engine.prefill(ids, state)
        if logits is None:
            raise ValueError("a prefill that nobody can cancel was cancelled")
        return Generation(
            self.engine.generate(state, logits, params, self.stop_ids, guess_from=ids), stream, self.stop_ids
        )

    def session(
        self,
        files: Sequence[str | Path] | str | Path = (),
        *,
        pack: PromptPack | None = None,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        context_limit: int | None = None,
    ) -> Session:
        """A conversation about files (read now, into memory) or about a pack; the model reads at the first question.

        Raises: RequestError if both are given; PackError for files that cannot be used.
        """
        if files and pack is not None:
            raise RequestError("files and pack are both given", "give one of them")
        if files:
            pack = PromptPack.build(read_sources(one_or_more(files)))
        options = SessionOptions(
            sampling or SamplingParams(max_tokens=default_max_tokens(self.name)),
            system,
            tuple(stop),
            self.context_limit if context_limit is None else context_limit,
        )
        return Session(self, pack, options)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is opened. Units: chunk_size and num_tokens in tokens; memory for num_tokens is checked before.

    None lets salalocal choose: a CUDA device if there is one; the checkpoint's dtype, or float32 for a small model on
    a CPU; the largest chunk that fits; int8 for products of many rows with int4 weights on a card; a cache as exact as
    the dtype, with keys and values on the card; guesses of what an answer copies from the text, see `prompt_lookup`,
    on a card that holds keys and values.
    """

    device: str | None = None
    dtype: str | torch.dtype | None = None
    chunk_size: int | None = None
    num_tokens: int = 0
    math: str | None = None
    kv_cache: str | None = None
    kv_place: str | None = None
    guess: bool | None = None

    @classmethod
    def of(cls, settings: Settings, num_tokens: int) -> "LoadOptions":
        """What the settings say."""
        cache = (settings.kv_cache, settings.kv_place)
        engine = (settings.chunk_size, num_tokens, settings.math)
        return cls(settings.device, settings.dtype, *engine, *cache, settings.guess)


def load(model: str | Path = BUILTIN, *, device: str | None = None, dtype: str | torch.dtype | None = None) -> Runtime:
    """Open a model: `builtin`, a folder, or a hub id that is in the local Hugging Face cache.

    `device` and `dtype` None let salalocal choose: a CUDA device if there is one; the checkpoint's dtype, or float32
    for a small model on a CPU. Raises: HubError, CheckpointError, BackendError, MemoryBudgetError, RequestError.
    """
    return open_runtime(find_model(model), str(model), LoadOptions(device, dtype))


def open_runtime(place: Path | ModelFolder, name: str, options: LoadOptions, codec: TextCodec | None = None) -> Runtime:
    """Open a model folder under a name; a codec that is open already is used as it is. Raises: as `load`."""
    wanted = _torch_dtype(options.dtype)
    device = pick_device(options.device)
    if options.chunk_size is not None:
        EngineConfig(options.chunk_size)  # a size that makes no sense is refused before anything is read
    folder = ModelFolder.of(place)
    checkpoint = Checkpoint.open(folder)
    codec = codec or TextCodec.from_folder(folder.path)
    if codec.tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{folder.path.name}: the tokenizer knows {codec.tokenizer.vocab_size:,} tokens, "
            f"the model {checkpoint.config.vocab_size:,}",
            "the folder mixes two models; download it again",
        )
    dtype = wanted or default_dtype(checkpoint, device)
    plan_options = _plan(checkpoint, device, dtype, options, name)
    with naming_memory_errors("loading the weights"):
        placement = Placement(plan_options.math, plan_options.is_embedding_on_host)
        model = load_model(checkpoint, device, dtype, placement)
        engine = Engine(model, engine_config(plan_options, options.guess))
    return Runtime(name, checkpoint.config, codec, engine)


def _plan(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, options: LoadOptions, name: str
) -> PlanOptions:
    """How memory will be used. Raises: MemoryBudgetError if it does not fit, with commands that do."""
    config, is_cuda = checkpoint.config, device.type == "cuda"
    weights, cache = _FORMATS[dtype]
    if options.kv_cache is not None:
        cache = cache_named(options.kv_cache, cache)
    has_kernels = HAS_TRITON and dtype == torch.bfloat16 and not why_no_kernels(config)
    plan_options = PlanOptions(weights, cache, is_cuda=is_cuda, math=math_named(options.math), has_kernels=has_kernels)
    record = config.quantization_config
    if record is not None:
        stored = StoredWeights(WeightFormat.of_record(record), weight_bytes(checkpoint, device, dtype))
        plan_options = replace(plan_options, weights=stored.weights, stored=stored)
    plan_options = placed(config, plan_options, options.kv_place)
    free = device_memory(device).free_bytes + (CUDA_DRIVER_BYTES if is_cuda else 0)  # the context is there already
    check_length(config, options.num_tokens, plan_options)
    plan_options = fitted(config, options.num_tokens, free, plan_options, options.chunk_size)
    plan = plan_memory(config, options.num_tokens, plan_options)
    request = PlanRequest(name, max(1, options.num_tokens), free, plan_options, lockable_bytes() if is_cuda else None)
    if not request.holds(plan):
        alternatives = make_plan(config, request).alternatives
        check_fits(plan, free, name, alternatives)
        check_lockable(plan, request.host_bytes or 0, alternatives)
    return plan_options


def engine_config(options: PlanOptions, guess: bool | None) -> EngineConfig:
    """How a planned model is run.

    Checking guesses reads the picks of several rows, which host memory is too far away for: nobody's wish means none.
    """
    is_guessing = not options.is_kv_on_host if guess is None else guess
    is_int8 = options.cache is CacheFormat.INT8
    return EngineConfig(options.chunk_size, is_int8, is_guessing, options.is_kv_on_host)


def math_named(name: str | None) -> Math:
    """What many rows are multiplied in on a card, by its name; None: the default. Raises: RequestError."""
    known: tuple[Math, ...] = get_args(Math)
    for word in known:
        if name in (word, None):
            return DEFAULT_MATH if name is None else word
    raise RequestError(f"--math is {str(name)[:40]!r}, not one of {', '.join(known)}", "for example: --math int8")


def cache_named(name: str, of_dtype: CacheFormat) -> CacheFormat:
    """The cache of that name: int8, or what the dtype computes in. Raises: RequestError."""
    if name == CacheFormat.INT8.value:
        return CacheFormat.INT8
    if name == of_dtype.value:
        return of_dtype
    raise RequestError(
        f"--kv-cache is {name[:40]!r}, not one of {of_dtype.value}, int8",
        f"{of_dtype.value} follows from the dtype, see --dtype",
    )


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype[:40]!r} is not known", f"use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


_FORMATS = {
    torch.bfloat16: (WeightFormat.BF16, CacheFormat.BF16),
    torch.float16: (WeightFormat.FP16, CacheFormat.BF16),
    torch.float32: (WeightFormat.FP32, CacheFormat.FP32),
}
