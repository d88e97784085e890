"""The baseline: a decoder with full attention in every layer and random weights, as fast as torch runs it; for `run`.

Its products are the vendor's, norms and gates are this package's own kernels, attention is the fastest of torch's fused
backends on this machine, timed before the walk. It reads in chunks: a chunk attends to itself causally and to all
before it without a mask, and both are joined by their log-sums, so that every backend can do it. On a card a drawn
token is one CUDA graph, over a cache of fixed length: it attends to the room for the tokens to come as well, at most
a few hundred rows of zeros more than it must.
Shapes: q [1, Hq, T, D]; keys, values [1, Hkv, N, D]; head h reads KV head h // (Hq / Hkv).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from salalocal.bench.ceilings import wait_for
from salalocal.bench.subject import WARM_UP_TOKENS, Drawn, OnTokens, SubjectFacts
from salalocal.bench.work import DenseCost, DenseShape
from salalocal.device import device_memory
from salalocal.errors import BackendError, MemoryBudgetError
from salalocal.kernels.norm import rms_norm
from salalocal.kernels.qk_norm_rope import NormRope, qk_norm_rope
from salalocal.kernels.swiglu import swiglu

_EPS, _THETA = 1e-6, 1e6
_STD = 0.02
_CARD_CHUNK = 8192
_TRIAL_KEYS = 8  # chunks of keys behind a chunk of queries that backends are timed on
_TRIAL_RUNS = 3
_TOLERANCE = 0.02

Backend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""q, keys, values, whether causal in; outputs and the natural log of the sum of each row's exponentials out."""


def _cudnn(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, keys, values, None, True, 0.0, is_causal)
    return out[0], out[1]


def _flash(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, is_causal)
    return out[0], out[1]


def _flash_cpu(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, is_causal)
    return out[0], out[1]


_BACKENDS: dict[str, dict[str, Backend]] = {
    "cuda": {"cuDNN": _cudnn, "flash": _flash},
    "cpu": {"flash for CPUs": _flash_cpu},
}


def attend(backend: Backend, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rows that are the last T of N, each over all keys up to its own. Shapes: see the module -> [1, Hq, T, D]."""
    num_rows, first = q.shape[2], keys.shape[2] - q.shape[2]
    if num_rows == 1:
        return backend(q, keys, values, False)[0]
    own, own_log = backend(q, keys[:, :, first:], values[:, :, first:], True)
    if first == 0:
        return own
    past, past_log = backend(q, keys[:, :, :first], values[:, :, :first], False)
    share = torch.sigmoid((past_log - own_log).reshape(*own.shape[:3], 1))
    return torch.lerp(own, past, share.to(own.dtype))


@dataclass(frozen=True)
class Trial:
    """Seconds of a backend at one chunk over eight, or why it cannot be used."""

    name: str
    seconds: float | None
    reason: str = ""


def choose_backend(shape: DenseShape, device: torch.device, dtype: torch.dtype, chunk: int) -> tuple[str, list[Trial]]:
    """The fastest backend that is right on this machine, and what was tried. Raises: BackendError if none is."""
    trials = [_trial(name, shape, device, dtype, chunk) for name in _BACKENDS[device.type]]
    timed = {trial.name: trial.seconds for trial in trials if trial.seconds is not None}
    if not timed:
        reasons = "; ".join(f"{trial.name}: {trial.reason}" for trial in trials)
        raise BackendError(f"no attention of torch runs the baseline here: {reasons}"[:250], "leave out --baseline")
    return min(timed, key=lambda name: timed[name]), trials


def _trial(name: str, shape: DenseShape, device: torch.device, dtype: torch.dtype, chunk: int) -> Trial:
    backend = _BACKENDS[device.type][name]
    try:
        if not _is_right(backend, shape, device, dtype):
            return Trial(name, None, "its results are wrong")
        q, keys, values = _random_heads(shape, device, dtype, chunk, _TRIAL_KEYS * chunk)
        attend(backend, q, keys, values)
        wait_for(device)
        started_s = time.perf_counter()
        for _ in range(_TRIAL_RUNS):
            attend(backend, q, keys, values)
        wait_for(device)
    except RuntimeError as error:  # torch's one way to say that a backend does not know a shape or a card
        return Trial(name, None, str(error).splitlines()[0][:120])
    return Trial(name, (time.perf_counter() - started_s) / _TRIAL_RUNS)


def _is_right(backend: Backend, shape: DenseShape, device: torch.device, dtype: torch.dtype) -> bool:
    q, keys, values = _random_heads(shape, device, dtype, 128, 384)
    group = shape.num_heads // shape.num_kv_heads
    wide_keys, wide_values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    is_seen = torch.ones(128, 384, dtype=torch.bool, device=device).tril(256)
    expected = functional.scaled_dot_product_attention(q.float(), wide_keys, wide_values, attn_mask=is_seen)
    error = (attend(backend, q, keys, values).float() - expected).norm() / expected.norm()
    return bool(error < _TOLERANCE)


def _random_heads(
    shape: DenseShape, device: torch.device, dtype: torch.dtype, num_rows: int, num_keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    def heads(num_heads: int, rows: int) -> Tensor:
        return torch.randn(1, num_heads, rows, shape.head_dim, device=device, dtype=dtype)

    return heads(shape.num_heads, num_rows), heads(shape.num_kv_heads, num_keys), heads(shape.num_kv_heads, num_keys)


class _Layer:
    """The weights of one layer, and its keys and values."""

    def __init__(self, shape: DenseShape, device: torch.device, dtype: torch.dtype) -> None:
        def matrix(num_out: int, num_in: int) -> Tensor:
            return torch.empty(num_out, num_in, device=device, dtype=dtype).normal_(0.0, _STD)

        def ones(size: int) -> Tensor:
            return torch.ones(size, device=device, dtype=dtype)

        hidden, width = shape.hidden_size, shape.num_heads * shape.head_dim
        self.qkv = matrix(width + 2 * shape.num_kv_heads * shape.head_dim, hidden)
        self.out = matrix(hidden, width)
        self.gate_up = matrix(2 * shape.intermediate_size, hidden)
        self.down = matrix(hidden, shape.intermediate_size)
        self.attention_norm, self.mlp_norm = ones(hidden), ones(hidden)
        self.q_norm, self.k_norm = ones(shape.head_dim), ones(shape.head_dim)
        self.keys = self.values = torch.empty(0)


class DenseModel:
    """The network; its cache is part of it."""

    def __init__(self, shape: DenseShape, device: torch.device, dtype: torch.dtype, backend: Backend) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._backend = backend
        self._embedding = torch.empty(shape.vocab_size, shape.hidden_size, device=device, dtype=dtype).normal_()
        self._head = torch.empty_like(self._embedding).normal_(0.0, _STD)
        self._norm = torch.ones(shape.hidden_size, device=device, dtype=dtype)
        self._layers = [_Layer(shape, device, dtype) for _ in range(shape.num_layers)]

    def make_room(self, capacity: int) -> None:
        """A cache for so many tokens, in the place of the old one."""
        shape = self.shape
        for layer in self._layers:
            layer.keys = layer.values = torch.empty(0)
        for layer in self._layers:
            size = (1, shape.num_kv_heads, capacity, shape.head_dim)
            layer.keys = torch.zeros(size, device=self.device, dtype=self.dtype)
            layer.values = torch.zeros(size, device=self.device, dtype=self.dtype)

    def read(self, ids: Tensor, positions: Tensor, num_keys: int) -> Tensor:
        """Take in tokens at these positions, which see the first `num_keys` rows of the cache, and give the likeliest
        next token. Shapes: ids, positions int64 [T] -> int64 [1]."""
        hidden = functional.embedding(ids, self._embedding)
        for layer in self._layers:
            hidden = self._mix(layer, hidden, positions, num_keys)
            gate, up = functional.linear(rms_norm(hidden, layer.mlp_norm, _EPS), layer.gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, swiglu(gate, up), layer.down.t())
        logits = functional.linear(rms_norm(hidden[-1:], self._norm, _EPS), self._head)
        return logits.argmax(-1)

    def _mix(self, layer: _Layer, hidden: Tensor, positions: Tensor, num_keys: int) -> Tensor:
        shape = self.shape
        sizes = [heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
        normed = rms_norm(hidden, layer.attention_norm, _EPS)
        q, k, v = (
            torch.unflatten(heads, -1, (-1, shape.head_dim))[None]
            for heads in torch.split(functional.linear(normed, layer.qkv), sizes, dim=-1)
        )
        q, k = qk_norm_rope(
            q, k, NormRope(q_weight=layer.q_norm, k_weight=layer.k_norm, eps=_EPS, positions=positions, theta=_THETA)
        )
        layer.keys.index_copy_(2, positions, k.transpose(1, 2))
        layer.values.index_copy_(2, positions, v.transpose(1, 2))
        attended = attend(self._backend, q.transpose(1, 2), layer.keys[:, :, :num_keys], layer.values[:, :, :num_keys])
        return torch.addmm(hidden, attended.transpose(1, 2).reshape(len(hidden), -1), layer.out.t())


class DenseSubject:
    """A dense model as a subject of a walk."""

    def __init__(self, shape: DenseShape, name: str, device: torch.device, dtype: torch.dtype, chunk_size: int) -> None:
        chunk_size = _CARD_CHUNK if device.type == "cuda" else chunk_size
        chosen, trials = choose_backend(shape, device, dtype, chunk_size)
        self.device = device
        self.cost = DenseCost(shape, dtype.itemsize)
        dtype_name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        self.facts = SubjectFacts(
            name="dense",
            description=f"{name}, full attention, random {dtype_name} weights",
            num_parameters=shape.num_parameters,
            model_bytes=shape.num_parameters * dtype.itemsize,
            dtype=dtype_name,
            math=dtype_name,
            cache=dtype_name,
            chunk_size=chunk_size,
            notes=(f"attention of the baseline: {chosen} ({', '.join(map(_shown_trial, trials))})",),
        )
        self._check_memory(self.facts.model_bytes, "its weights")
        with torch.inference_mode():
            self._model = DenseModel(shape, device, dtype, _BACKENDS[device.type][chosen])
        self._num_tokens = self._capacity = 0
        self._last = torch.zeros(1, dtype=torch.int64, device=device)

    def warm_up(self, depths: Sequence[int]) -> None:
        """One chunk and its half, and a few tokens drawn."""
        enough = self.facts.chunk_size * 3 // 2
        first, last = min(depths[0], enough), min(depths[-1], enough)
        self.read(first, lambda tokens: None)
        self.read(last - first, lambda tokens: None)
        self.draw(WARM_UP_TOKENS - 1, 1, True)

    def begin(self, capacity: int) -> None:
        """An empty cache for so many tokens; one that is there already is used again."""
        self._num_tokens = 0
        if capacity == self._capacity:
            return
        shape, self._capacity = self._model.shape, 0
        self._model.make_room(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        needed = shape.cache_bytes(capacity, self._model.dtype.itemsize)
        self._check_memory(needed, f"the cache of {capacity:,} tokens")
        with torch.inference_mode():
            self._model.make_room(capacity)
        self._capacity = capacity

    def read(self, num_tokens: int, on_tokens: OnTokens) -> None:
        """Read random tokens in chunks on the grid of absolute multiples, as the engine does."""
        end, done = self._num_tokens + num_tokens, 0
        while self._num_tokens < end:
            first = self._num_tokens
            last = min(end, (first // self.facts.chunk_size + 1) * self.facts.chunk_size)
            ids = torch.randint(0, self._model.shape.vocab_size, (last - first,), device=self.device)
            with torch.inference_mode():
                self._last = self._model.read(ids, torch.arange(first, last, device=self.device), last)
            wait_for(self.device)
            self._num_tokens, done = last, done + last - first
            on_tokens(done)

    def draw(self, num_tokens: int, num_runs: int, is_last: bool) -> Drawn:
        """Greedy tokens; rows that they add to the cache are written over by the next read."""
        started_s = time.perf_counter()
        int(self._last)
        first_s = time.perf_counter() - started_s
        room = self._num_tokens + 1 + num_tokens * num_runs
        started_s = time.perf_counter()
        step = self._captured_step(room) if self.device.type == "cuda" else self._step(self._num_tokens)
        step()
        setup_s = time.perf_counter() - started_s
        runs_s = []
        for _ in range(num_runs):
            started_s = time.perf_counter()
            for _ in range(num_tokens):
                step()
            runs_s.append(time.perf_counter() - started_s)
        return Drawn(first_s, setup_s, tuple(runs_s))

    def _step(self, first: int) -> Callable[[], int]:
        position, token = first, self._last

        def step() -> int:
            nonlocal position, token
            with torch.inference_mode():
                at = torch.tensor([position], device=self.device)
                token = self._model.read(token, at, position + 1)
            position += 1
            return int(token)

        return step

    def _captured_step(self, room: int) -> Callable[[], int]:
        """One graph for every token; a token is fetched before the next is asked for, as a chat would."""
        with torch.inference_mode():
            token, at = self._last.clone(), torch.tensor([self._num_tokens], device=self.device)

            def work() -> None:
                token.copy_(self._model.read(token, at, room))
                at.add_(1)

            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
            token.copy_(self._last)
            at.fill_(self._num_tokens)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()

        def step() -> int:
            graph.replay()
            return int(token)

        return step

    def _check_memory(self, needed: int, what: str) -> None:
        free = device_memory(self.device).free_bytes
        if needed > free:
            raise MemoryBudgetError(
                f"out of memory: {what} need{'s' if 'cache' in what else ''} {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free"
            )


def _shown_trial(trial: Trial) -> str:
    return f"{trial.name} {trial.seconds * 1e3:.1f} ms" if trial.seconds is not None else f"{trial.name} {trial.reason}"
