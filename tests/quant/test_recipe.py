"""Recipes: every tensor in one step, schemes shared where engines fuse, sizes that do not fit refused."""

import pytest
from checkpoint_cases import small_config

from salalocal.checkpoint.names import expected_tensors
from salalocal.errors import RequestError
from salalocal.model.config import SPARSE, SalaConfig
from salalocal.quant.codebook import FP4, NF4, CodebookScheme
from salalocal.quant.int4 import IntScheme
from salalocal.quant.recipe import ROW, QuantizeOptions, make_steps, parse_group_size, quantization_record

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
    eight = {name for step in steps for name, scheme in step.schemes.items() if scheme == IntScheme(8, 128)}
    layers = [layer for layer, mixer in enumerate(RELEASED.mixer_types) if mixer == SPARSE]
    assert eight == {f"model.layers.{layer}.self_attn.{x}_proj.weight" for layer in layers for x in "qkv"}
    record = quantization_record(RELEASED, QuantizeOptions(sensitive_bits=8), "bfloat16")
    assert len(record["dynamic"]) == len(layers) and record["bits"] == 4
    assert "dynamic" not in quantization_record(RELEASED, QuantizeOptions(), "bfloat16")


def test_the_head_is_quantized_only_when_asked_and_never_where_it_is_the_embedding() -> None:
    options = QuantizeOptions(head_bits=8)
    steps = make_steps(RELEASED, options)
    assert steps[-1].schemes == {"lm_head.weight": IntScheme(8, 128)}
    assert not make_steps(RELEASED, QuantizeOptions())[-1].schemes
    record = quantization_record(RELEASED, options, "bfloat16")
    assert record["lm_head"] is True and record["dynamic"] == {"+:^lm_head$": {"bits": 8}}
    alike = quantization_record(RELEASED, QuantizeOptions(bits=8, sensitive_bits=8, head_bits=8), "bfloat16")
    assert alike["lm_head"] is True and "dynamic" not in alike
    assert quantization_record(RELEASED, QuantizeOptions(), "bfloat16")["lm_head"] is False
    saved = sum(step.result_bytes for step in make_steps(RELEASED, QuantizeOptions())) - sum(
        step.result_bytes for step in steps
    )
    assert saved == pytest.approx(RELEASED.vocab_size * RELEASED.hidden_size * (1 - 3 / 128), rel=1e-3)
    with pytest.raises(RequestError, match="shares the embedding") as caught:
        make_steps(small_config(tie_word_embeddings=True), QuantizeOptions(head_bits=8, group_size=8))
    assert caught.value.hint == "--lm-head 16"


def test_a_group_may_be_a_row() -> None:
    options = QuantizeOptions(group_size=ROW)
    for step in make_steps(RELEASED, options):
        for name, scheme in step.schemes.items():
            assert scheme == IntScheme(4, step.shapes[name][1])
    assert quantization_record(RELEASED, options, "bfloat16")["group_size"] == -1
    make_steps(small_config(), options)  # whatever its widths are


@pytest.mark.parametrize("kind", [NF4, FP4])
def test_a_codebook_has_blocks_along_the_whole_matrix(kind: str) -> None:
    options = QuantizeOptions(method=kind, group_size=64)
    steps = make_steps(RELEASED, options)
    schemes = {scheme for step in steps for scheme in step.schemes.values()}
    assert schemes == {CodebookScheme(kind, 64)} and sum(step.num_quantized for step in steps) == 8_875_147_264
    dense = 2 * (RELEASED.num_parameters - 8_875_147_264)
    packed = 8_875_147_264 * (4 + 32 / 64) / 8
    assert sum(step.result_bytes for step in steps) == pytest.approx(dense + packed, rel=1e-4)
    record = quantization_record(RELEASED, options, "float16")
    assert (record["quant_method"], record["bnb_4bit_quant_type"]) == ("bitsandbytes", kind)
    assert record["bnb_4bit_compute_dtype"] == "float16"
    make_steps(small_config(), options)  # rows of 24 and 48 end within blocks
    with pytest.raises(RequestError, match="needs rows of even length"):
        make_steps(small_config(hidden_size=47), options)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "int4-g128-rtn"),
        ({"method": "gptq", "group_size": ROW}, "int4-row-gptq"),
        ({"sensitive_bits": 8, "head_bits": 8}, "int4-g128-rtn-sensitive8-head8"),
        ({"bits": 8, "sensitive_bits": 8}, "int8-g128-rtn"),
        ({"method": "nf4", "group_size": 64}, "nf4-g64"),
    ],
)
def test_labels_tell_options_apart(options: dict[str, object], label: str) -> None:
    assert QuantizeOptions(**options).label == label  # type: ignore[arg-type]


def test_group_sizes_as_they_are_typed() -> None:
    assert [parse_group_size(None, method) for method in ("rtn", "gptq", "nf4", "fp4")] == [128, 128, 64, 64]
    assert [parse_group_size(text, "rtn") for text in ("32", "row", "ROW", "-1")] == [32, ROW, ROW, ROW]
    for text in ("", "many", "-2", "1.5", "9" * 5000, "\u0663\u0662"):
        with pytest.raises(RequestError, match="is no number") as caught:
            parse_group_size(text, "rtn")
        assert "128, row" in caught.value.hint
    with pytest.raises(RequestError, match="'awq'"):
        parse_group_size("128", "awq")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "awq"}, "rtn, gptq, nf4, fp4"),
        ({"group_size": -2}, "128, row"),
        ({"head_bits": 4}, "8, 16"),
        ({"method": "nf4", "group_size": ROW}, "64, 128"),
        ({"method": "nf4", "group_size": 64, "bits": 8}, "--method gptq"),
        ({"method": "fp4", "group_size": 64, "sensitive_bits": 8}, "--method gptq"),
        ({"method": "nf4", "group_size": 64, "head_bits": 8}, "--method gptq"),
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
    with pytest.raises(RequestError, match="groups of a row do not fit") as caught:
        make_steps(small_config(intermediate_size=84), QuantizeOptions(group_size=ROW))
    assert caught.value.hint == "a model of such sizes cannot be quantized"
