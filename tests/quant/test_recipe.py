"""Recipes: every tensor in one step, schemes shared where engines fuse, sizes that do not fit refused."""

import pytest
from checkpoint_cases import small_config

from salalocal.checkpoint.names import expected_tensors
from salalocal.errors import RequestError
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.quant.recipe import QuantizeOptions, gptq_record, make_steps

RELEASED = SalaConfig.released()


def test_every_tensor_is_in_one_step_in_the_order_of_the_forward_pass() -> None:
    for config in (RELEASED, small_config(), small_config(tie_word_embeddings=True)):
        steps = make_steps(config, QuantizeOptions(group_size=8))
        names = [name for step in steps for name in step.shapes]
        assert sorted(names) == sorted(expected_tensors(config)) and len(set(names)) == len(names)
        assert [step.layer for step in steps] == [None, *range(config.num_hidden_layers), None]
        assert names[0] == "model.embed_tokens.weight" and "model.norm.weight" in steps[-1].shapes


def test_all_linear_maps_of_layers_are_quantized_and_nothing_else() -> None:
    steps = make_steps(RELEASED, QuantizeOptions())
    assert sum(step.num_quantized for step in steps) == 8_875_147_264
    quantized = {name for step in steps for name in step.schemes}
    assert len(quantized) == 32 * 8 and not any("norm" in name or "embed" in name for name in quantized)
    # 4 bits and a bf16 scale and 4-bit zero for every 128 weights; g_idx is small beside them.
    dense = 2 * (RELEASED.num_parameters - 8_875_147_264)
    packed = 8_875_147_264 * (4 + 20 / 128) / 8
    assert sum(step.result_bytes for step in steps) == pytest.approx(dense + packed, rel=1e-3)


def test_sensitive_maps_are_q_k_v_of_sparse_layers_together() -> None:
    steps = make_steps(RELEASED, QuantizeOptions(sensitive_bits=8))
    eight = {name for step in steps for name, scheme in step.schemes.items() if scheme.bits == 8}
    layers = [layer for layer, mixer in enumerate(RELEASED.mixer_types) if mixer == SPARSE]
    assert eight == {f"model.layers.{layer}.self_attn.{x}_proj.weight" for layer in layers for x in "qkv"}
    record = gptq_record(RELEASED, QuantizeOptions(sensitive_bits=8))
    assert len(record["dynamic"]) == len(layers) and record["bits"] == 4
    assert "dynamic" not in gptq_record(RELEASED, QuantizeOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "awq"}, "rtn, gptq"),
        ({"bits": 3}, "4, 8"),
        ({"group_size": 100}, "128"),
        ({"sensitive_bits": 5}, "8"),
    ],
)
def test_unknown_options_are_refused_with_what_is_known(options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        QuantizeOptions(**options)  # type: ignore[arg-type]
    assert said in caught.value.hint


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5, float("nan")])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(RequestError, match="damping"):
        QuantizeOptions(damping=damping)


def test_groups_that_do_not_fit_are_refused_with_one_that_does() -> None:
    with pytest.raises(RequestError, match=r"q_proj.*groups of 128") as caught:
        make_steps(small_config(), QuantizeOptions())
    assert caught.value.hint == "--group-size 16"
    with pytest.raises(RequestError, match="do not fit"):
        make_steps(small_config(intermediate_size=84), QuantizeOptions(group_size=8))
