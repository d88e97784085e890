"""The model in float64 numpy, written from the specification alone and from nothing else.

In: weights by upstream tensor name, the dict of a config.json, token ids, a switch rule. Out: logits, and every
intermediate a test wants to see (selected blocks, margins, keys, compressed keys, states). For the tests: it is the
second pair of eyes, so it imports nothing of the package and is as plain as it can be: one sequence, one row at a
time, one head group at a time. Section numbers are those of the model specification.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Blocks = tuple[int, ...]

SPARSE_NAMES = ("minicpm4", "minicpm", "standard", "attention", "attn")
LIGHTNING_NAMES = ("lightning", "lightning_attn", "lightning-attn")


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Normalise the last axis by its root mean square, then multiply by the weight as stored."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def linear(x: Array, weight: Array) -> Array:
    """x @ weight^T for x [T, in]; not a matrix product, since that may give equal rows unequal last bits."""
    return np.einsum("ti,oi->to", x, weight)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), through tanh so that nothing overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def rotary(x: Array, positions: Sequence[int], theta: float) -> Array:
    """Rotate x [T, H, D] by its absolute positions: channel i pairs with channel i + D/2 (section 7)."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for t, p in enumerate(positions):
        for i in range(half):
            phi = p * theta ** (-2.0 * i / x.shape[-1])
            first, second = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = first * math.cos(phi) - second * math.sin(phi)
            out[t, :, i + half] = second * math.cos(phi) + first * math.sin(phi)
    return out


def lightning_slopes(num_heads: int) -> Array:
    """The positive decay rate of each head: the ALiBi series."""
    power = 1
    while power * 2 <= num_heads:
        power *= 2
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    finer = [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(2 * power)]
    return np.array(slopes + finer[0::2][: num_heads - power])


def lightning(
    q: Array, k: Array, v: Array, slopes: Array, scale: float, state: Array | None = None
) -> tuple[Array, Array]:
    """Run the recurrence of 8.2 over q, k [T, H, K] and v [T, H, V]; returns o [T, H, V] and the state [H, K, V]."""
    num_tokens, num_heads, key_dim = q.shape
    current = np.zeros((num_heads, key_dim, v.shape[-1])) if state is None else state.copy()
    out = np.empty((num_tokens, num_heads, v.shape[-1]))
    for t in range(num_tokens):
        for h in range(num_heads):
            current[h] = math.exp(-slopes[h]) * current[h] + np.outer(k[t, h], v[t, h])
            out[t, h] = scale * (q[t, h] @ current[h])
    return out, current


@dataclass(frozen=True)
class Geometry:
    """The sizes of section 9, named as in sparse_config."""

    kernel_size: int
    kernel_stride: int
    block_size: int
    init_blocks: int
    window_size: int
    topk: int

    @classmethod
    def of(cls, sparse_config: Mapping[str, Any]) -> "Geometry":
        """Pick the six sizes out of a config.json's sparse_config."""
        names = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
        return cls(**{name: sparse_config[name] for name in names})

    @property
    def local_blocks(self) -> int:
        """Blocks before the query's own that the window covers."""
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        """Blocks a row may read, the forced ones included."""
        return self.topk + self.local_blocks

    @property
    def reach(self) -> int:
        """A row at a position below this reads every block before it."""
        return self.budget * self.block_size


def compressed_keys(keys: Array, kernel: int, stride: int) -> Array:
    """Mean of every complete window of keys [N, H, D]; window j starts at stride * j (9.1)."""
    means = []
    start = 0
    while start + kernel <= len(keys):
        means.append(keys[start : start + kernel].mean(axis=0))
        start += stride
    return np.array(means).reshape(len(means), *keys.shape[1:])


def num_visible(p: int, num_windows: int, kernel: int, stride: int) -> int:
    """How many of the windows lie wholly at positions <= p (9.2)."""
    count = 0
    while count < num_windows and stride * count + kernel - 1 <= p:
        count += 1
    return count


def log_sum_exp(x: Array) -> float:
    """log(sum(exp(x)))."""
    top = float(np.max(x))
    return top + math.log(float(np.sum(np.exp(x - top))))


def stage1_scores(q: Array, k1: Array, k2: Array, p: int, geometry: Geometry, scale: float) -> Array:
    """Score of every k1 for one row: q [Hq, D], k1 [N1, Hkv, D], k2 [N2, Hkv, D] -> [Hkv, N1] (9.3).

    Each key is worked on by itself, so that equal keys have equal scores to the last bit, and ties stay ties.
    """
    num_groups = k1.shape[1]
    group_size = len(q) // num_groups
    visible1 = num_visible(p, len(k1), geometry.kernel_size, geometry.kernel_stride)
    visible2 = num_visible(p, len(k2), 4 * geometry.kernel_size, 4 * geometry.kernel_stride)
    scores = np.zeros((num_groups, len(k1)))
    if visible1 == 0:
        return scores
    for g in range(num_groups):
        for h in range(g * group_size, (g + 1) * group_size):
            z = (k1[:visible1, g] * q[h]).sum(axis=1) * scale
            # Section 16: a row that sees no coarse key takes the normaliser from the fine ones.
            w = (k2[:visible2, g] * q[h]).sum(axis=1) * scale if visible2 > 0 else z
            normaliser = log_sum_exp(w)
            scores[g, :visible1] += [math.exp(z_j - normaliser) for z_j in z]
    return scores


def pool_to_block(scores: Array, x: int, geometry: Geometry) -> float:
    """Largest score [N1] among the compressed keys whose window overlaps block x (9.4); 0 if there is none."""
    per_block = geometry.block_size // geometry.kernel_stride
    overlap = geometry.kernel_size // geometry.kernel_stride
    first = max(0, per_block * x - (overlap - 1))
    last = min(len(scores) - 1, per_block * x + per_block - 1)
    return max((float(scores[j]) for j in range(first, last + 1)), default=0.0)


def forced_blocks(p: int, geometry: Geometry) -> set[int]:
    """The init blocks and the local blocks of the row at p (9.5)."""
    own = p // geometry.block_size
    init = {x for x in range(geometry.init_blocks) if x <= own}
    return init | {x for x in range(own + 1) if own - geometry.local_blocks <= x}


def choose_blocks(scores: Array, p: int, geometry: Geometry) -> tuple[Blocks, float]:
    """Blocks of one row and KV head from its scores [N1], ascending, and the relative margin of the choice (9.5, 16).

    The margin is (smallest chosen - largest rejected) / smallest chosen over the free blocks, and infinite where
    nothing had to be rejected.
    """
    forced = forced_blocks(p, geometry)
    free = [x for x in range(p // geometry.block_size + 1) if x not in forced]
    pooled = {x: pool_to_block(scores, x, geometry) for x in free}
    ranking = sorted(free, key=lambda x: (-pooled[x], x))
    places = geometry.budget - len(forced)
    chosen, rejected = ranking[:places], ranking[places:]
    margin = math.inf
    if chosen and rejected:
        smallest = pooled[chosen[-1]]
        margin = (smallest - pooled[rejected[0]]) / smallest if smallest > 0 else 0.0
    return tuple(sorted(forced | set(chosen))), margin


def select_row(
    q: Array, k1: Array, k2: Array, p: int, geometry: Geometry, scale: float
) -> tuple[tuple[Blocks, ...], tuple[float, ...]]:
    """Blocks and margins of every KV head for the row q [Hq, D] at position p."""
    scores = stage1_scores(q, k1, k2, p, geometry, scale)
    chosen = [choose_blocks(scores[g], p, geometry) for g in range(len(scores))]
    return tuple(blocks for blocks, _ in chosen), tuple(margin for _, margin in chosen)


def attend_row(q: Array, k: Array, v: Array, tokens: Sequence[Sequence[int]], scale: float) -> Array:
    """Softmax attention of one row q [Hq, D] over the listed tokens of each KV head (k, v [N, Hkv, D])."""
    num_groups = k.shape[1]
    group_size = len(q) // num_groups
    out = np.empty((len(q), v.shape[-1]))
    for g in range(num_groups):
        for h in range(g * group_size, (g + 1) * group_size):
            logits = k[tokens[g], g] @ q[h] * scale
            weights = np.exp(logits - log_sum_exp(logits))
            out[h] = weights @ v[tokens[g], g]
    return out


def tokens_of_blocks(blocks: Blocks, p: int, block_size: int) -> list[int]:
    """Positions <= p inside the blocks (9.6)."""
    return [t for x in blocks for t in range(x * block_size, (x + 1) * block_size) if t <= p]


def dense_attention(q: Array, k: Array, v: Array, first_position: int, scale: float) -> Array:
    """Plain causal attention: q [T, Hq, D] starts at first_position, k and v [N, Hkv, D] at 0."""
    out = np.empty((*q.shape[:2], v.shape[-1]))
    for t in range(len(q)):
        everything = list(range(first_position + t + 1))
        out[t] = attend_row(q[t], k, v, [everything] * k.shape[1], scale)
    return out


def block_attention(
    q: Array, k: Array, v: Array, blocks: Sequence[Sequence[Blocks]], first_position: int, block_size: int, scale: float
) -> Array:
    """Attention of row t over the tokens of blocks[t][g] only, causal."""
    out = np.empty((*q.shape[:2], v.shape[-1]))
    for t in range(len(q)):
        p = first_position + t
        tokens = [tokens_of_blocks(blocks[t][g], p, block_size) for g in range(k.shape[1])]
        out[t] = attend_row(q[t], k, v, tokens, scale)
    return out


def is_sparse_row(p: int, rule: str, dense_len: int, prompt_tokens: int | None = None) -> bool:
    """Whether the row at p uses the selection under "position", "prompt" or "always"."""
    if rule == "always":
        return True
    if rule == "prompt":
        if prompt_tokens is None:
            raise ValueError("the prompt rule needs the length of the prompt")
        if p < prompt_tokens:
            return prompt_tokens >= dense_len
    elif rule != "position":
        raise ValueError(rule)
    return p + 1 >= dense_len


@dataclass
class LayerTrace:
    """What one layer saw. blocks[p] is None where row p is dense, else one tuple of blocks per KV head."""

    kind: str
    q: Array
    k: Array
    v: Array
    k1: Array | None = None
    k2: Array | None = None
    blocks: list[tuple[Blocks, ...] | None] = field(default_factory=list)
    margins: list[tuple[float, ...] | None] = field(default_factory=list)
    state: Array | None = None


@dataclass
class Forward:
    """The result of a whole forward pass."""

    logits: Array
    hidden: Array
    layers: list[LayerTrace]


def sparse_mixer(
    x: Array,
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    rule: str,
    prompt_tokens: int | None,
    given: Mapping[int, Sequence[Blocks]],
) -> tuple[Array, LayerTrace]:
    """Section 5, for the whole sequence at once; weights of this self_attn only.

    A sparse row named in `given` attends to those blocks; its own choice is recorded all the same.
    """
    num_tokens, dim = len(x), config["head_dim"]
    geometry = Geometry.of(config["sparse_config"])
    scale = 1.0 / math.sqrt(dim)
    q = linear(x, weights["q_proj.weight"]).reshape(num_tokens, config["num_attention_heads"], dim)
    k = linear(x, weights["k_proj.weight"]).reshape(num_tokens, config["num_key_value_heads"], dim)
    v = linear(x, weights["v_proj.weight"]).reshape(num_tokens, config["num_key_value_heads"], dim)
    trace = LayerTrace("sparse", q, k, v)
    trace.k1 = compressed_keys(k, geometry.kernel_size, geometry.kernel_stride)
    trace.k2 = compressed_keys(k, 4 * geometry.kernel_size, 4 * geometry.kernel_stride)
    attended = np.empty_like(q)
    for p in range(num_tokens):
        tokens = [list(range(p + 1))] * k.shape[1]
        blocks, margins = None, None
        if is_sparse_row(p, rule, config["sparse_config"]["dense_len"], prompt_tokens):
            blocks, margins = select_row(q[p], trace.k1, trace.k2, p, geometry, scale)
            tokens = [tokens_of_blocks(of_head, p, geometry.block_size) for of_head in given.get(p, blocks)]
        trace.blocks.append(blocks)
        trace.margins.append(margins)
        attended[p] = attend_row(q[p], k, v, tokens, scale)
    gate = sigmoid(linear(x, weights["o_gate.weight"]))
    return linear(attended.reshape(num_tokens, -1) * gate, weights["o_proj.weight"]), trace


def lightning_mixer(x: Array, weights: Mapping[str, Array], config: Mapping[str, Any]) -> tuple[Array, LayerTrace]:
    """Section 6, for the whole sequence at once; weights of this self_attn only."""
    num_tokens, dim, eps = len(x), config["lightning_head_dim"], config["rms_norm_eps"]
    num_heads, num_kv_heads = config["lightning_nh"], config["lightning_nkv"]
    q = linear(x, weights["q_proj.weight"]).reshape(num_tokens, num_heads, dim)
    k = linear(x, weights["k_proj.weight"]).reshape(num_tokens, num_kv_heads, dim)
    v = linear(x, weights["v_proj.weight"]).reshape(num_tokens, num_kv_heads, dim)
    q = rotary(rms_norm(q, weights["q_norm.weight"], eps), range(num_tokens), config["rope_theta"])
    k = rotary(rms_norm(k, weights["k_norm.weight"], eps), range(num_tokens), config["rope_theta"])
    k = np.repeat(k, num_heads // num_kv_heads, axis=1)
    v = np.repeat(v, num_heads // num_kv_heads, axis=1)
    o, state = lightning(q, k, v, lightning_slopes(num_heads), 1.0 / math.sqrt(dim))
    o = rms_norm(o.reshape(num_tokens, -1), weights["o_norm.weight"], eps)
    gate = sigmoid(linear(x, weights["z_proj.weight"]))
    return linear(o * gate, weights["o_proj.weight"]), LayerTrace("lightning", q, k, v, state=state)


def forward(
    weights: Mapping[str, npt.ArrayLike],
    config: Mapping[str, Any],
    tokens: Sequence[int],
    rule: str = "position",
    prompt_tokens: int | None = None,
    given: Mapping[tuple[int, int], Sequence[Blocks]] | None = None,
) -> Forward:
    """Section 4: the whole model over one sequence read from position 0.

    `given` names blocks by (layer, position) that a sparse row attends to in place of its own choice, so that an
    implementation of less precision can be judged apart from the choices in which it rightly differs.
    """
    w = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in weights.items()}
    eps, num_layers = config["rms_norm_eps"], config["num_hidden_layers"]
    branch = config["scale_depth"] / math.sqrt(num_layers)
    h = w["model.embed_tokens.weight"][list(tokens)] * config["scale_emb"]
    layers = []
    for n in range(num_layers):
        prefix = f"model.layers.{n}."
        own = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        attn = {name.removeprefix("self_attn."): t for name, t in own.items() if name.startswith("self_attn.")}
        x = rms_norm(h, own["input_layernorm.weight"], eps)
        if config["mixer_types"][n] in SPARSE_NAMES:
            of_layer = {p: blocks for (layer, p), blocks in (given or {}).items() if layer == n}
            y, trace = sparse_mixer(x, attn, config, rule, prompt_tokens, of_layer)
        elif config["mixer_types"][n] in LIGHTNING_NAMES:
            y, trace = lightning_mixer(x, attn, config)
        else:
            raise ValueError(config["mixer_types"][n])
        layers.append(trace)
        h = h + y * branch
        x = rms_norm(h, own["post_attention_layernorm.weight"], eps)
        inner = silu(linear(x, own["mlp.gate_proj.weight"])) * linear(x, own["mlp.up_proj.weight"])
        h = h + linear(inner, own["mlp.down_proj.weight"]) * branch
    hidden = rms_norm(h, w["model.norm.weight"], eps)
    head = w["model.embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    logits = linear(hidden / (config["hidden_size"] / config["dim_model_base"]), head)
    return Forward(logits, hidden, layers)
