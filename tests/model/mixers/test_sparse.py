"""The sparse layer: the specification's section 5 on both sides of the switch, and a state that only ever grows."""

import random

import numpy as np
import oracle
import pytest
import torch
from small_configs import CONFIGS, Config
from torch import Tensor

from salalocal.errors import StateError
from salalocal.kernels.kv_cache import append_tokens
from salalocal.kernels.pooled_keys import num_pooled, pooled_keys_definition
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinearFactory
from salalocal.model.mixers.sparse import SparseMixer, SparseState
from salalocal.model.state import StateSpec

NAMES = ["plain", "always", "tied", "wide", "apart", "bare"]
CPU = torch.device("cpu")
NEVER = 1 << 40


def build(config: Config, dtype: torch.dtype, seed: int) -> SparseMixer:
    """A layer with random weights that are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    mixer = SparseMixer(SalaConfig.from_hf(config), "layer", DenseLinearFactory(CPU, dtype), CPU, dtype)
    for _, parameter in sorted(mixer.named_parameters()):
        drawn = 1.5 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        parameter.data.copy_(drawn.bfloat16())
    return mixer


def draw(config: Config, num_tokens: int, seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_tokens, config["hidden_size"], generator=generator).bfloat16().double()


def new_state(
    mixer: SparseMixer, sparse_from: int, batch: int = 1, capacity: int = 0, is_int8: bool = False
) -> SparseState:
    dtype = mixer.q_proj.weight.dtype
    spec = StateSpec(
        batch_size=batch, capacity=capacity, sparse_from=sparse_from, device=CPU, dtype=dtype, is_int8=is_int8
    )
    return mixer.new_state(spec)


def read(mixer: SparseMixer, x: Tensor, state: SparseState, cuts: random.Random | None = None) -> Tensor:
    """Feed x in one call, or in random chunks, some of one token."""
    parts, at = [], 0
    while at < x.shape[1]:
        size = cuts.choice([1, 2, 15, 16, 17, 33, 63, 64, 65]) if cuts else x.shape[1]
        parts.append(mixer(x[:, at : at + size].to(mixer.q_proj.weight.dtype), state))
        at += size
    return torch.cat(parts, 1)


def expect(mixer: SparseMixer, config: Config, x: Tensor, rule: str, dense_len: int) -> np.ndarray:
    weights = {name: parameter.detach().double().numpy() for name, parameter in mixer.named_parameters()}
    changed = {**config, "sparse_config": {**config["sparse_config"], "dense_len": dense_len}}
    return np.stack([oracle.sparse_mixer(one.numpy(), weights, changed, rule, None, {})[0] for one in x])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunks", ["one", "random"])
def test_layer_is_the_specification(name: str, chunks: str, seed: int) -> None:
    rng = random.Random(seed)
    config, num_tokens = CONFIGS[name], rng.randint(300, 330)
    mixer, x = build(config, torch.float64, seed), draw(config, num_tokens, seed, batch=2)
    for sparse_from in (0, rng.randrange(num_tokens), NEVER):
        with torch.inference_mode():
            state = new_state(mixer, sparse_from, batch=2)
            found = read(mixer, x, state, rng if chunks == "random" else None)
        expected = expect(mixer, config, x, "position", sparse_from + 1)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)
        assert state.num_tokens == num_tokens and state.sparse_from == sparse_from


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_other_dtypes_stay_close_where_rows_are_dense(name: str, dtype: torch.dtype, bound: float, seed: int) -> None:
    # Beyond the switch a rounded score may choose another block, which says nothing about the arithmetic.
    mixer, x = build(CONFIGS[name], dtype, seed), draw(CONFIGS[name], 200, seed)
    with torch.inference_mode():
        found = read(mixer, x, new_state(mixer, NEVER), random.Random(seed))
    expected = expect(mixer, CONFIGS[name], x, "position", NEVER)
    assert found.dtype == dtype
    assert np.abs(found.double().numpy() - expected).max() < bound * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_is_dense_below_the_reach(name: str, dtype: torch.dtype, seed: int) -> None:
    sizes = CONFIGS[name]["sparse_config"]
    reach = (sizes["topk"] + sizes["window_size"] // sizes["block_size"]) * sizes["block_size"]
    mixer, x = build(CONFIGS[name], dtype, seed), draw(CONFIGS[name], reach, seed)
    with torch.inference_mode():
        sparse, dense = (read(mixer, x, new_state(mixer, start)) for start in (0, NEVER))
    assert torch.equal(sparse, dense)


def test_one_row_beyond_the_reach_is_no_longer_dense(seed: int) -> None:
    mixer, x = build(CONFIGS["plain"], torch.float64, seed), draw(CONFIGS["plain"], 97 + 16, seed)
    with torch.inference_mode():
        sparse, dense = (read(mixer, x, new_state(mixer, start)) for start in (0, NEVER))
    assert torch.equal(sparse[:, :96], dense[:, :96])
    assert (sparse[:, 96:] - dense[:, 96:]).abs().amax(-1).min() > 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_pooled_keys_follow_the_keys_however_they_came(name: str, seed: int) -> None:
    sizes = CONFIGS[name]["sparse_config"]
    mixer, x = build(CONFIGS[name], torch.float32, seed), draw(CONFIGS[name], 290, seed)
    rng = random.Random(seed)
    state = new_state(mixer, 0, capacity=rng.choice([0, 100, 300]))
    with torch.inference_mode():
        at, before = 0, {}
        while at < 290:
            end = min(290, at + rng.choice([1, 1, 7, 16, 31, 64]))
            mixer(x[:, at:end].float(), state)
            for level, factor in (("k1", 1), ("k2", 4)):
                kernel, stride = factor * sizes["kernel_size"], factor * sizes["kernel_stride"]
                pooled = getattr(state, level)
                assert pooled.shape[1] == num_pooled(end, kernel, stride)
                exact = pooled_keys_definition(state.key_values.keys.double(), 0, pooled.shape[1], kernel, stride)
                torch.testing.assert_close(pooled.double(), exact, rtol=0, atol=1e-6)
                if level in before:
                    assert torch.equal(pooled[:, : before[level].shape[1]], before[level])
                before[level] = pooled.clone()
            at = end


def test_forks_go_their_own_ways(seed: int) -> None:
    config = CONFIGS["plain"]
    mixer, x, other = build(config, torch.float64, seed), draw(config, 260, seed), draw(config, 260, seed + 1)
    x, other = x, torch.cat([x[:, :150], other[:, 150:]], 1)
    with torch.inference_mode():
        state = new_state(mixer, 100)
        read(mixer, x[:, :150], state)
        left, right = state.fork(), state.fork()
        found = read(mixer, other[:, 150:], right), read(mixer, x[:, 150:], left)
        for tokens, rest in zip((other, x), found, strict=True):
            whole = read(mixer, tokens, new_state(mixer, 100))
            torch.testing.assert_close(rest, whole[:, 150:], rtol=0, atol=1e-11)
        assert (state.num_tokens, left.num_tokens, right.num_tokens) == (150, 260, 260)
        torch.testing.assert_close(read(mixer, x[:, 150:170], state), found[1][:, :20], rtol=0, atol=1e-11)
    assert right.sparse_from == 100 and right.nbytes > 0


@pytest.mark.parametrize("num_tokens", [0, 7, 8, 31, 32, 150])
def test_a_saved_state_goes_on_where_it_was(num_tokens: int, seed: int) -> None:
    config = CONFIGS["plain"]
    mixer, x = build(config, torch.float32, seed), draw(config, num_tokens + 40, seed).float()
    with torch.inference_mode():
        state = new_state(mixer, 100)
        read(mixer, x[:, :num_tokens], state) if num_tokens else None
        saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
        assert set(saved) == {"k", "v", "k1", "k2"}
        loaded = new_state(mixer, 100).from_tensors(saved, num_tokens)
        assert (loaded.num_tokens, loaded.sparse_from) == (num_tokens, 100)
        assert torch.equal(read(mixer, x[:, num_tokens:], loaded), read(mixer, x[:, num_tokens:], state))
        saved["k"].zero_()
        assert num_tokens == 0 or loaded.key_values.keys.abs().sum() > 0


def test_a_saved_state_that_does_not_fit_is_refused(seed: int) -> None:
    config = CONFIGS["plain"]
    mixer = build(config, torch.float32, seed)
    with torch.inference_mode():
        state = new_state(mixer, 0)
        read(mixer, draw(config, 50, seed).float(), state)
    saved = state.tensors()
    for change in (
        {"k1": saved["k1"][:, :-1]},
        {"k2": saved["k1"]},
        {"v": saved["v"].double()},
        {"k": saved["k"][:, :, :1]},
        {"k3": saved["k1"]},
    ):
        with pytest.raises(StateError):
            new_state(mixer, 0).from_tensors({**saved, **change}, 50)
    with pytest.raises(StateError):
        new_state(mixer, 0).from_tensors({name: saved[name] for name in ("k", "v", "k1")}, 50)
    with pytest.raises(StateError):
        new_state(mixer, 0).from_tensors(saved, 49)


@pytest.mark.parametrize("sparse_from", [0, NEVER])
def test_gradients_reach_every_weight(sparse_from: int, seed: int) -> None:
    config = CONFIGS["plain"]
    mixer, x = build(config, torch.float64, seed), draw(config, 200, seed)
    read(mixer, x, new_state(mixer, sparse_from)).square().sum().backward()
    direction = {name: torch.randn_like(parameter) for name, parameter in mixer.named_parameters()}
    slope = sum((parameter.grad * direction[name]).sum() for name, parameter in mixer.named_parameters())
    values = []
    for step in (1e-7, -1e-7):
        moved = build(config, torch.float64, seed)
        for name, parameter in moved.named_parameters():
            parameter.data += step * direction[name]
        with torch.inference_mode():
            values.append(read(moved, x, new_state(moved, sparse_from)).square().sum())
    assert abs((values[0] - values[1]) / 2e-7 - slope) < 1e-4 * abs(slope) + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_keys_in_8_bits_leave_the_choice_as_it_is_and_move_the_output_little(name: str, seed: int) -> None:
    mixer, x = build(CONFIGS[name], torch.bfloat16, seed), draw(CONFIGS[name], 300, seed)
    with torch.inference_mode():
        whole, small = new_state(mixer, 0), new_state(mixer, 0, is_int8=True)
        expected, found = (read(mixer, x, state, random.Random(seed)) for state in (whole, small))
    # Pooled from keys that were not quantized, so every score, and with it every choice, is the same.
    assert torch.equal(small.k1, whole.k1) and torch.equal(small.k2, whole.k2)
    assert small.key_values.keys.dtype == torch.int8 and small.num_tokens == whole.num_tokens == 300
    for part in ("keys", "values"):
        exact = getattr(whole.key_values, part).float()
        error = (getattr(small.key_values.widened(torch.float32), part) - exact).abs()
        assert (error <= exact.abs().amax(-1, keepdim=True) * (0.5 * 1.01 / 127) * 1.01).all()
    assert (found.float() - expected.float()).norm() < 3e-2 * expected.float().norm()
    assert not torch.equal(found, expected)


def test_forks_with_keys_in_8_bits_go_their_own_ways(seed: int) -> None:
    mixer, x = build(CONFIGS["plain"], torch.bfloat16, seed), draw(CONFIGS["plain"], 330, seed)
    other = torch.cat([x[:, :270], draw(CONFIGS["plain"], 60, seed + 1)], 1)
    with torch.inference_mode():
        state = new_state(mixer, 100, is_int8=True)
        read(mixer, x[:, :270], state)
        left, right = state.fork(), state.fork()
        # One after the other in turns: a ring that two shared would mix their keys.
        for start in range(270, 330, 7):
            read(mixer, x[:, start : start + 7], left)
            read(mixer, other[:, start : start + 7], right)
        for tokens, fork in ((x, left), (other, right)):
            whole = new_state(mixer, 100, is_int8=True)
            read(mixer, tokens[:, :270], whole)
            for start in range(270, 330, 7):
                read(mixer, tokens[:, start : start + 7], whole)
            for name, tensor in whole.tensors().items():
                assert torch.equal(fork.tensors()[name], tensor), name
    assert state.num_tokens == 270 and left.nbytes > 0


@pytest.mark.parametrize("num_tokens", [0, 7, 40, 300])
def test_a_saved_state_with_keys_in_8_bits_goes_on_where_it_was(num_tokens: int, seed: int) -> None:
    mixer, x = build(CONFIGS["plain"], torch.bfloat16, seed), draw(CONFIGS["plain"], num_tokens + 60, seed)
    with torch.inference_mode():
        state = new_state(mixer, 100, is_int8=True)
        read(mixer, x[:, :num_tokens], state) if num_tokens else None
        saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
        assert set(saved) == {"k", "v", "k_scales", "v_scales", "k1", "k2", "recent"}
        loaded = new_state(mixer, 100, is_int8=True).from_tensors(saved, num_tokens)
        saved["recent"].zero_()  # the loaded state has its own
        assert torch.equal(read(mixer, x[:, num_tokens:], loaded), read(mixer, x[:, num_tokens:], state))
        for name, tensor in state.tensors().items():
            assert torch.equal(loaded.tensors()[name], tensor), name


def test_a_state_saved_in_other_bits_is_refused(seed: int) -> None:
    mixer, x = build(CONFIGS["plain"], torch.bfloat16, seed), draw(CONFIGS["plain"], 50, seed)
    states = [new_state(mixer, 0, is_int8=is_int8) for is_int8 in (False, True)]
    with torch.inference_mode():
        for state in states:
            read(mixer, x, state)
    for state, other in (states, states[::-1]):
        with pytest.raises(StateError, match="a layer holds"):
            state.from_tensors(other.tensors(), 50)
    cut = {**states[1].tensors(), "recent": states[1].tensors()["recent"][:, :-1]}
    with pytest.raises(StateError, match="recent"):
        states[1].from_tensors(cut, 50)


@pytest.mark.parametrize("is_int8", [False, True])
def test_room_is_made_for_a_kernel_and_counted_when_it_is_filled(is_int8: bool, seed: int) -> None:
    mixer, x = build(CONFIGS["plain"], torch.bfloat16, seed), draw(CONFIGS["plain"], 150, seed)
    with torch.inference_mode():
        state = new_state(mixer, 0, is_int8=is_int8)
        read(mixer, x[:, :100], state)
        fork = state.fork()
        before = {name: tensor.clone() for name, tensor in fork.tensors().items()}
        rows = state.room_for(50)
        assert rows.keys.shape[1] >= 150 and rows.k1.shape[1] >= num_pooled(150, 32, 16)
        assert (rows.recent is not None) == (rows.key_scales is not None) == is_int8
        k, v = torch.randn(2, 50, *rows.keys.shape[::2]).bfloat16()
        append_tokens(rows, k, v, torch.tensor([100]), mixer._geometry)
        assert state.num_tokens == 100  # until it is told
        state.extend(50)
        appended = fork.fork()
        appended.append(k[None], v[None])
        assert state.num_tokens == appended.num_tokens == 150
        for name, tensor in appended.tensors().items():
            assert torch.equal(state.tensors()[name], tensor), name
        assert all(torch.equal(fork.tensors()[name], tensor) for name, tensor in before.items())
