"""SalaModel: tensor names, switch rules, rounding of the residual, states, files. The laws stand elsewhere."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_configs import CONFIGS, random_weights, tensor_shapes
from torch import nn

from salalocal.errors import StateError
from salalocal.model.config import SalaConfig
from salalocal.model.layers import DenseLinear
from salalocal.model.sala import SalaModel, SwitchRule
from salalocal.model.state import ModelState


def build(name: str, seed: int, dtype: torch.dtype = torch.float32) -> SalaModel:
    model = SalaModel(SalaConfig.from_hf(CONFIGS[name]), dtype=dtype)
    model.load_state_dict(random_weights(CONFIGS[name], seed))
    return model.requires_grad_(False)


def tokens(model: SalaModel, num: int, seed: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, num), generator=generator)


def read(model: SalaModel, ids: torch.Tensor, state: ModelState, chunk: int) -> torch.Tensor:
    """Logits of all tokens, fed on the absolute grid of `chunk` tokens."""
    return torch.cat([model.logits(model(piece, state)) for piece in ids.split(chunk, dim=1)], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_named_and_shaped_as_in_the_checkpoint(name: str) -> None:
    model = SalaModel(SalaConfig.from_hf(CONFIGS[name]), device="meta")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == tensor_shapes(CONFIGS[name])
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_released_shape_has_395_tensors_and_the_exact_count() -> None:
    model = SalaModel(SalaConfig.released(), device="meta")
    assert len(model.state_dict()) == 395
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_477_203_968


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127))
def test_chunks_and_single_tokens_give_the_logits_of_one_call(name: str, num_tokens: int, seed: int) -> None:
    model = build(name, seed, torch.float64)
    ids = tokens(model, num_tokens, seed, batch=2)
    whole = read(model, ids, model.new_state(batch_size=2), num_tokens)
    for chunk in (1, 7, 64):
        state = model.new_state(batch_size=2)
        torch.testing.assert_close(read(model, ids, state, chunk), whole, rtol=1e-8, atol=1e-8)
        assert state.num_tokens == num_tokens


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_grid_gives_the_same_bits_cold_forked_or_from_a_file(
    name: str, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    model = build(name, seed, dtype)
    ids = tokens(model, 200, seed)
    cold_state = model.new_state(capacity=300)
    cold = read(model, ids, cold_state, 64)

    state = model.new_state()
    read(model, ids[:, :128], state, 64)
    state.save(tmp_path / "state")
    fork = state.fork()
    loaded, _ = ModelState.load(tmp_path / "state", model.new_state())
    for resumed in (fork, loaded, state):
        assert resumed.num_tokens == 128
        assert torch.equal(read(model, ids[:, 128:], resumed, 64), cold[:, 128:])
    assert torch.equal(model(ids[:, :1], loaded), model(ids[:, :1], cold_state))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fork_leaves_its_original_untouched(name: str, seed: int) -> None:
    model = build(name, seed)
    ids = tokens(model, 100, seed)
    state = model.new_state()
    read(model, ids, state, 64)
    before = [{key: tensor.clone() for key, tensor in layer.tensors().items()} for layer in state.layers]
    forks = [state.fork() for _ in range(3)]
    outputs = [read(model, tokens(model, 50, seed + n), fork, 16) for n, fork in enumerate(forks)]
    for layer, contents in zip(state.layers, before, strict=True):
        assert all(torch.equal(tensor, contents[key]) for key, tensor in layer.tensors().items())
    again = [read(model, tokens(model, 50, seed + n), state.fork(), 16) for n in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(outputs, again, strict=True))


def test_switch_rules_become_one_position() -> None:
    assert SwitchRule.POSITION.sparse_from(8192) == 8191
    assert SwitchRule.POSITION.sparse_from(0) == 0
    assert SwitchRule.ALWAYS.sparse_from(8192) == 0
    assert SwitchRule.PROMPT.sparse_from(8192, 8191) == 8191
    assert SwitchRule.PROMPT.sparse_from(8192, 8192) == 0
    with pytest.raises(ValueError, match="prompt_tokens"):
        SwitchRule.PROMPT.sparse_from(8192)
    model = SalaModel(SalaConfig.from_hf(CONFIGS["plain"]), dtype=torch.float32)
    assert model.new_state().sparse_from == 129
    assert model.new_state(switch=SwitchRule.ALWAYS).sparse_from == 0
    assert model.new_state(switch=SwitchRule.PROMPT, prompt_tokens=130).sparse_from == 0


def test_rules_agree_where_rows_agree(seed: int) -> None:
    model = build("plain", seed, torch.float64)
    ids = tokens(model, 180, seed)
    position, always, short, full = (
        read(model, ids, model.new_state(switch=rule, prompt_tokens=prompt), 60)
        for rule, prompt in (
            (SwitchRule.POSITION, None),
            (SwitchRule.ALWAYS, None),
            (SwitchRule.PROMPT, 129),
            (SwitchRule.PROMPT, 180),
        )
    )
    assert torch.equal(position, short) and torch.equal(always, full)
    # Below the reach of six blocks of 16 both read everything.
    torch.testing.assert_close(position[:, :96], always[:, :96], rtol=1e-8, atol=1e-8)
    assert not torch.allclose(position[:, 97:129], always[:, 97:129])


def test_branch_is_rounded_before_it_joins_the_residual(seed: int) -> None:
    model = build("lightning", seed, torch.bfloat16)
    block, hidden = model.model.layers[0], tokens(model, 40, seed).unsqueeze(-1).bfloat16() / 37
    hidden = hidden * torch.linspace(0.5, 1.5, model.config.hidden_size).bfloat16()
    scale = model.config.residual_scale
    branch = block.self_attn(block.input_layernorm(hidden), model.new_state().layers[0])
    middle = hidden + (branch.double() * scale).bfloat16()
    last = middle + (block.mlp(block.post_attention_layernorm(middle)).double() * scale).bfloat16()
    assert torch.equal(block(hidden, model.new_state().layers[0]), last)


def test_logits_are_taken_in_the_models_dtype_and_given_in_fp32(seed: int) -> None:
    model = build("plain", seed, torch.bfloat16)
    hidden = model(tokens(model, 5, seed), model.new_state())
    assert hidden.dtype == torch.bfloat16
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())
    assert isinstance(model.lm_head, DenseLinear)
    expected = (hidden.double() / 3) @ model.lm_head.weight.double().T
    assert (logits - expected).abs().max() / expected.abs().max() < 2e-2
    assert build("plain", seed, torch.float64).logits(hidden.double()).dtype == torch.float64


def test_embedding_is_scaled_and_tied_head_shares_it(seed: int) -> None:
    model = build("tied", seed, torch.float64)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([[5, 9]]), model.new_state())
    assert torch.equal(seen[0][0], 3 * model.model.embed_tokens.weight[[5, 9]])
    assert model.lm_head is None and "lm_head.weight" not in model.state_dict()
    hidden = torch.randn(1, 2, model.config.hidden_size, dtype=torch.float64)
    weight = model.model.embed_tokens.weight
    torch.testing.assert_close(model.logits(hidden), hidden / model.config.logit_divisor @ weight.T)


def test_a_state_of_another_model_or_left_half_way_is_refused(seed: int, tmp_path: Path) -> None:
    model, ids = build("plain", seed), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(StateError, match="another model"):
        model(ids, build("lightning", seed).new_state())
    state = model.new_state()
    broken = model.model.layers[2]
    handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(ids, state)
    handle.remove()
    for use in (lambda: model(ids, state), lambda: state.save(tmp_path / "state")):
        with pytest.raises(StateError, match="half way: layer 0 holds 1 tokens, the model 0"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...], seed: int) -> None:
    model = build("lightning", seed)
    with pytest.raises(ValueError, match="needed is"):
        model(torch.zeros(shape, dtype=torch.int64), model.new_state())


def test_every_linear_comes_from_the_factory_under_its_checkpoint_name() -> None:
    asked: dict[str, tuple[int, int]] = {}

    def factory(name: str, in_features: int, out_features: int) -> nn.Module:
        asked[name] = (out_features, in_features)
        return DenseLinear(in_features, out_features, "meta", torch.float32)

    raw: dict[str, Any] = CONFIGS["always"]
    SalaModel(SalaConfig.from_hf(raw), factory, device="meta")
    matrices = {name: shape for name, shape in tensor_shapes(raw).items() if len(shape) == 2}
    matrices.pop("model.embed_tokens.weight")
    assert {f"{name}.weight": shape for name, shape in asked.items()} == matrices


def test_weights_can_be_drawn_and_trained(seed: int) -> None:
    config = dataclasses.replace(SalaConfig.from_hf(CONFIGS["plain"]), dtype="float32")
    first, second = SalaModel(config), SalaModel(config)
    for model in (first, second):
        model.init_weights(std=0.05, generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    deviation = first.model.embed_tokens.weight.std().item()
    assert math.isclose(deviation, 0.05, rel_tol=0.1) and bool((first.model.norm.weight == 1).all())
    ids = tokens(first, 150, seed, batch=2)
    first.logits(first(ids, first.new_state(batch_size=2))).square().mean().backward()
    for name, parameter in first.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 0, name


def test_a_cache_in_8_bits_is_for_one_sequence_and_moves_the_logits_little(seed: int) -> None:
    model = build("plain", seed, torch.bfloat16)
    with pytest.raises(ValueError, match="for one sequence, not for 2"):
        model.new_state(2, is_int8=True)
    ids = tokens(model, 300, seed)
    with torch.inference_mode():
        expected, found = (read(model, ids, model.new_state(1, is_int8=is_int8), 50) for is_int8 in (False, True))
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(errors[0, :90].max()) < 0.2  # all see every block
    assert float(errors.median()) < 5e-2


def test_states_with_keys_in_8_bits_come_back_from_a_file(seed: int, tmp_path: Path) -> None:
    model = build("plain", seed, torch.bfloat16)
    ids = tokens(model, 330, seed)
    with torch.inference_mode():
        state = model.new_state(1, is_int8=True)
        read(model, ids[:, :270], state, 90)
        state.save(tmp_path / "state")
        loaded, _ = ModelState.load(tmp_path / "state", model.new_state(1, is_int8=True))
        assert torch.equal(*(read(model, ids[:, 270:], one, 30) for one in (state, loaded)))
        with pytest.raises(StateError, match="a layer holds"):
            ModelState.load(tmp_path / "state", model.new_state(1))
