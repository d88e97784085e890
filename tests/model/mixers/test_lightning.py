"""The lightning layer: order of operations, grouped keys, dtypes between the steps, and its state."""

import pytest
import torch
from oracle import lightning as oracle_lightning
from oracle import lightning_slopes as oracle_slopes
from oracle import rms_norm as oracle_norm
from oracle import rotary as oracle_rotary
from small_configs import CONFIGS

from salalocal.errors import StateError
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinearFactory
from salalocal.model.mixers.lightning import LightningMixer, LightningState
from salalocal.model.state import StateSpec

CPU = torch.device("cpu")


def make(name: str, dtype: torch.dtype, seed: int) -> tuple[SalaConfig, LightningMixer]:
    config = SalaConfig.from_hf(CONFIGS[name])
    mixer = LightningMixer(config, "m", DenseLinearFactory(CPU, dtype), CPU, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            drawn = 1 + 0.3 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5
            parameter.copy_(drawn.bfloat16())
    return config, mixer


def spec(dtype: torch.dtype, batch: int = 1) -> StateSpec:
    return StateSpec(batch_size=batch, capacity=0, sparse_from=0, device=CPU, dtype=dtype)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def by_the_specification(config: SalaConfig, mixer: LightningMixer, x: torch.Tensor) -> torch.Tensor:
    """Section 6 of the specification in float64 numpy, for one sequence [T, hidden]."""
    shape = config.lightning
    weights = {name: parameter.detach().double().numpy() for name, parameter in mixer.named_parameters()}
    rows, positions = x.double().numpy(), range(x.shape[0])

    def heads(name: str, count: int):
        return (rows @ weights[f"{name}_proj.weight"].T).reshape(-1, count, shape.head_dim)

    groups = shape.num_heads // shape.num_key_value_heads
    q, k = (
        oracle_rotary(oracle_norm(y, weights[f"{n}_norm.weight"], config.rms_norm_eps), positions, config.rope_theta)
        for n, y in (("q", heads("q", shape.num_heads)), ("k", heads("k", shape.num_key_value_heads)))
    )
    k, v = k.repeat(groups, axis=1), heads("v", shape.num_key_value_heads).repeat(groups, axis=1)
    o, _ = oracle_lightning(q, k, v, oracle_slopes(shape.num_heads), shape.head_dim**-0.5)
    o = oracle_norm(o.reshape(x.shape[0], -1), weights["o_norm.weight"], config.rms_norm_eps)
    gate = torch.special.expit(torch.from_numpy(rows @ weights["z_proj.weight"].T)).numpy()
    return torch.from_numpy((o * gate) @ weights["o_proj.weight"].T)


@pytest.mark.parametrize("name", ("plain", "always", "tied", "wide", "apart"))
def test_layer_is_the_specification(name: str, seed: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        config, mixer = make(name, dtype, seed)
        x = draw(seed, 2, 70, config.hidden_size, dtype=dtype)
        with torch.no_grad():
            y = mixer(x, mixer.new_state(spec(dtype, batch=2)))
        assert y.dtype == dtype
        for row in range(2):
            expected = by_the_specification(config, mixer, x[row])
            error = (y[row].double() - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name} {dtype}: {error}"


@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000))
def test_one_call_is_two_calls(num_tokens: int, seed: int) -> None:
    config, mixer = make("plain", torch.float64, seed)
    x = draw(seed, 1, num_tokens + 3, config.hidden_size)
    with torch.no_grad():
        whole = mixer(x, once := mixer.new_state(spec(torch.float64)))
        state = mixer.new_state(spec(torch.float64))
        parts = [mixer(x[:, :num_tokens], state), mixer(x[:, num_tokens:], state)]
    assert state.num_tokens == num_tokens + 3
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.matrix, once.matrix, rtol=1e-9, atol=1e-9)


def test_the_past_is_kept_in_fp32_or_better(seed: int) -> None:
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        config, mixer = make("plain", dtype, seed)
        state = mixer.new_state(spec(dtype))
        assert state.matrix.dtype == kept
        with torch.no_grad():
            mixer(draw(seed, 1, 5, config.hidden_size, dtype=dtype), state)
        assert state.matrix.dtype == kept and state.nbytes == 4 * 16 * 16 * kept.itemsize


def test_a_fork_goes_its_own_way(seed: int) -> None:
    config, mixer = make("plain", torch.float32, seed)
    state = mixer.new_state(spec(torch.float32))
    x = draw(seed, 1, 9, config.hidden_size, dtype=torch.float32)
    with torch.no_grad():
        mixer(x, state)
        before, fork = state.matrix.clone(), state.fork()
        mixer(x, fork)
    assert torch.equal(state.matrix, before) and (state.num_tokens, fork.num_tokens) == (9, 18)
    assert not torch.equal(fork.matrix, before)


def test_contents_come_back_or_are_refused(seed: int) -> None:
    state = LightningState(draw(seed, 1, 2, 3, 3, dtype=torch.float32), 9)
    like = LightningState(torch.zeros(1, 2, 3, 3), 0)
    again = like.from_tensors(state.tensors(), 9)
    assert torch.equal(again.matrix, state.matrix) and again.num_tokens == 9
    assert again.matrix.data_ptr() != state.matrix.data_ptr()
    for wrong in ({}, {"s": state.matrix, "t": state.matrix}, {"s": state.matrix[:, :1]}, {"s": state.matrix.double()}):
        with pytest.raises(StateError):
            like.from_tensors(wrong, 9)


def test_a_matrix_that_a_fork_may_share_is_written_to_as_a_copy(seed: int) -> None:
    matrix = draw(seed, 1, 2, 4, 4)
    state = LightningState(matrix.clone(), 5)
    assert state.writable() is state.matrix  # alone: in place
    fork = state.fork()
    for one, other in ((fork, state), (state, fork)):
        kept = other.matrix.clone()
        one.writable().add_(1)
        one.extend(1)
        assert torch.equal(other.matrix, kept)
    assert torch.equal(state.matrix, matrix + 1) and torch.equal(fork.matrix, matrix + 1)
    assert (state.num_tokens, fork.num_tokens) == (6, 6)
    address = fork.writable().data_ptr()
    assert fork.writable().data_ptr() == address  # its own by now: no second copy
    fork.fork()
    assert fork.writable().data_ptr() != address


def test_a_matrix_put_in_place_is_nobody_elses(seed: int) -> None:
    state = LightningState(draw(seed, 1, 2, 4, 4), 5)
    fork = state.fork()
    new = draw(seed + 1, 1, 2, 4, 4)
    state.advance(new, 3)
    assert state.writable() is new and state.num_tokens == 8 and fork.num_tokens == 5
