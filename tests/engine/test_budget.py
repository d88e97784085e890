"""The memory plan gives the figures of the specification, and bounds what a run really takes."""

import math
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from checkpoint_cases import small_config

from salalocal.engine.budget import (
    CUDA_CHUNKS,
    CUDA_DRIVER_BYTES,
    CacheFormat,
    Math,
    MemoryPlan,
    PlanOptions,
    StoredWeights,
    WeightFormat,
    check_fits,
    check_length,
    check_lockable,
    fitted,
    longest_context,
    most_tokens,
    plan_memory,
    weight_bytes,
    why_no_kernels,
)
from salalocal.errors import CheckpointError, MemoryBudgetError, RequestError
from salalocal.model.config import SalaConfig
from salalocal.quant.recipe import QuantizeOptions, make_steps

RELEASED = SalaConfig.released()
MIB, GIB = 2**20, 2**30


def test_the_figures_of_section_15_1() -> None:
    assert weight_bytes(RELEASED, WeightFormat.BF16) == 18_954_407_936
    assert round(weight_bytes(RELEASED, WeightFormat.BF16) / GIB, 2) == 17.65
    one, more = plan_memory(RELEASED, 1024), plan_memory(RELEASED, 1024 + 64)
    assert more.kv_bytes - one.kv_bytes == 64 * 8192
    assert more.k1_bytes - one.k1_bytes == 64 * 256
    assert more.k2_bytes - one.k2_bytes == 64 * 64
    assert more.cache_bytes - one.cache_bytes == 64 * 8512
    assert one.lightning_bytes == 50_331_648 == 48 * MIB


@pytest.mark.parametrize(
    ("num_tokens", "kv", "k1", "k2", "cache", "with_weights"),
    [
        (64 * 1024, 512 * MIB, 16 * MIB, 4 * MIB, 532 * MIB, 18.22),
        (128 * 1024, 1 * GIB, 32 * MIB, 8 * MIB, 1064 * MIB, 18.74),
        (256 * 1024, 2 * GIB, 64 * MIB, 16 * MIB, 2128 * MIB, 19.78),
        (512 * 1024, 4 * GIB, 128 * MIB, 32 * MIB, 4256 * MIB, 21.86),
        (1024 * 1024, 8 * GIB, 256 * MIB, 64 * MIB, 8512 * MIB, 26.01),
        (2048 * 1024, 16 * GIB, 512 * MIB, 128 * MIB, 17024 * MIB, 34.32),
    ],
)
def test_the_figures_of_section_15_3(
    num_tokens: int, kv: int, k1: int, k2: int, cache: int, with_weights: float
) -> None:
    plan = plan_memory(RELEASED, num_tokens)
    assert (plan.kv_bytes, plan.k1_bytes, plan.k2_bytes, plan.cache_bytes) == (kv, k1, k2, cache)
    assert round((plan.weight_bytes + plan.state_bytes) / GIB, 2) == with_weights


def test_the_figures_of_section_14() -> None:
    """The published GPTQ files leave the 32 gates in bf16; those of `quantize` do not."""
    gate = 4096 * 4096
    codes_and_zeros, scales_and_index = (gate + 32 * 4096) // 2, 2 * 32 * 4096 + 4 * 4096
    saved = 32 * (2 * gate - codes_and_zeros - scales_and_index)
    assert weight_bytes(RELEASED, WeightFormat.INT4) == 6_615_093_248 - saved
    assert weight_bytes(RELEASED, WeightFormat.FP32) == 2 * weight_bytes(RELEASED, WeightFormat.FP16)


def test_integers_are_counted_as_the_quantizer_writes_them() -> None:
    for weights, bits in ((WeightFormat.INT4, 4), (WeightFormat.INT8, 8)):
        steps = make_steps(RELEASED, QuantizeOptions(bits=bits, sensitive_bits=bits))
        assert weight_bytes(RELEASED, weights) == sum(step.result_bytes for step in steps)


def test_other_formats_are_counted_by_formula() -> None:
    packed = 8_875_147_264  # weights of the maps of layers; a zero point per group of 128 is as wide as a code
    int8 = weight_bytes(RELEASED, WeightFormat.INT8) - weight_bytes(RELEASED, WeightFormat.INT4)
    assert int8 == packed // 2 + packed // 128 // 2
    codebook = 2 * (RELEASED.num_parameters - packed) + packed // 2 + 4 * packed // 64
    assert weight_bytes(RELEASED, WeightFormat.NF4) == weight_bytes(RELEASED, WeightFormat.FP4) == codebook


def int_record(bits: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits}


def packed_record(bits: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (int_record(4), WeightFormat.INT4),
        (int_record(8), WeightFormat.INT8),
        (packed_record(8), WeightFormat.INT8),
        (packed_record(4), WeightFormat.INT4),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, WeightFormat.NF4),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, WeightFormat.FP4),
    ],
)
def test_a_record_names_its_format(record: dict[str, object], expected: WeightFormat) -> None:
    assert WeightFormat.of_record(record) is expected


@pytest.mark.parametrize(
    "record",
    [
        {},
        int_record(3),
        int_record(None),
        packed_record([4]),
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": 4}}},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": ["nf4"]},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": {"gptq": 1}},
    ],
)
def test_a_record_without_a_known_format_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="int8, int4, nf4, fp4"):
        WeightFormat.of_record(record)


def test_a_quantized_folder_is_counted_only_where_its_format_is_planned() -> None:
    stored = StoredWeights(WeightFormat.NF4, 12345)
    assert plan_memory(RELEASED, 1, PlanOptions(WeightFormat.NF4, stored=stored)).weight_bytes == 12345
    for other in (WeightFormat.BF16, WeightFormat.INT4):
        plan = plan_memory(RELEASED, 1, PlanOptions(other, is_cuda=False, stored=stored))
        assert plan.weight_bytes == weight_bytes(RELEASED, other)


@pytest.mark.parametrize("weights", [WeightFormat.INT4, WeightFormat.INT8])
def test_a_card_holds_two_folded_numbers_for_every_output_of_a_packed_map(weights: WeightFormat) -> None:
    on_cpu, on_card = (plan_memory(RELEASED, 1, PlanOptions(weights, is_cuda=is_cuda)) for is_cuda in (False, True))
    attention = {"q": 4096, "gate": 4096, "out": 4096}
    sparse, lightning = (sum(attention.values()) + 2 * width for width in (256, 4096))
    outputs = 8 * sparse + 24 * lightning + 32 * (2 * 16384 + 4096)
    assert on_card.weight_bytes - on_cpu.weight_bytes == 8 * outputs
    without = plan_memory(RELEASED, 1, PlanOptions(weights, has_kernels=False))
    assert without.weight_bytes == on_cpu.weight_bytes


def test_an_int8_cache_halves_the_keys_and_values_but_for_the_scales() -> None:
    plan = plan_memory(RELEASED, 65536, PlanOptions(cache=CacheFormat.INT8))
    assert plan.kv_bytes == 65536 * 8 * 2 * 2 * (128 + 2)
    assert plan.pooled_key_bytes == 20 * MIB


def test_the_total_is_the_sum_and_the_driver_is_for_cuda_only() -> None:
    on_card, on_cpu = plan_memory(RELEASED, 1000), plan_memory(RELEASED, 1000, PlanOptions(is_cuda=False))
    assert (on_card.driver_bytes, on_cpu.driver_bytes) == (CUDA_DRIVER_BYTES, 0)
    in_8_bits = plan_memory(RELEASED, 1000, PlanOptions(cache=CacheFormat.INT8))
    parts = ("weight", "kv", "k1", "k2", "lightning", "activation", "logits", "driver", "recent")
    for plan in (on_card, in_8_bits):
        assert plan.total_bytes == sum(getattr(plan, f"{part}_bytes") for part in parts)
    assert all(getattr(in_8_bits, f"{part}_bytes") > 0 for part in parts)


def test_an_8_bit_cache_keeps_its_last_keys_unquantized() -> None:
    plan = plan_memory(RELEASED, 65536, PlanOptions(cache=CacheFormat.INT8))
    assert plan.recent_bytes == MIB == plan.state_bytes - plan.cache_bytes - plan.lightning_bytes
    assert plan_memory(RELEASED, 65536).recent_bytes == 0


@pytest.mark.parametrize("cache", [CacheFormat.BF16, CacheFormat.INT8])
def test_keys_and_values_in_host_memory_take_none_of_the_card(cache: CacheFormat) -> None:
    usual = PlanOptions(WeightFormat.INT4, cache)
    on_card, on_host = (
        plan_memory(RELEASED, 2**20, replace(usual, is_kv_on_host=is_on_host)) for is_on_host in (False, True)
    )
    assert on_host.kv_bytes == 0 and on_host.host_bytes == on_card.kv_bytes and on_card.host_bytes == 0
    assert on_host.pooled_key_bytes == on_card.pooled_key_bytes and on_host.recent_bytes == on_card.recent_bytes
    copies = on_host.activation_bytes - on_card.activation_bytes
    assert 0 < copies < 300 * MIB
    table = plan_memory(RELEASED, 1, replace(usual, is_embedding_on_host=True)).host_bytes
    assert table == 2 * 73448 * 4096


def test_two_million_tokens_run_on_a_small_card_beside_host_memory() -> None:
    """A context of 2M tokens on a card of 8 GB, keys and values in 8 or in 16 bits beside it."""
    for cache, host_gib in ((CacheFormat.INT8, 9), (CacheFormat.BF16, 17)):
        options = PlanOptions(WeightFormat.INT4, cache, is_kv_on_host=True)
        plan = plan_memory(RELEASED, 2**21 + 256, fitted(RELEASED, 2**21 + 256, 8 * GIB, options))
        check_fits(plan, 8 * GIB)
        check_lockable(plan, host_gib * GIB)
        longest = longest_context(RELEASED, 8 * GIB, options, host_gib * GIB)
        assert 2**21 < longest < longest_context(RELEASED, 8 * GIB, options)
        with pytest.raises(MemoryBudgetError, match=r"of host memory that stays locked, 8\.00 GiB may be"):
            check_lockable(plan, 8 * GIB)


def test_constants_are_those_of_the_kernels() -> None:
    from salalocal.engine import budget, picks
    from salalocal.kernels.block_attention import host
    from salalocal.kernels.block_topk.decode_choice import MOST_BLOCKS
    from salalocal.kernels.int4.activations_by_group import ACTIVATION_GROUP
    from salalocal.kernels.int4.scratch import GROUP_SIZES
    from salalocal.kernels.kv_cache import RECENT_TOKENS
    from salalocal.kernels.lightning_decode import MAX_STEPS

    assert budget._HOST_COPIES == host.MOST_COPIES and budget._RECENT_TOKENS == RECENT_TOKENS
    assert budget._MOST_BLOCKS == MOST_BLOCKS
    assert budget._RECORDED_ROWS == picks.RING_ROWS and budget._STEP_ROWS == MAX_STEPS
    assert set(budget._KERNEL_GROUPS) == set(GROUP_SIZES) and budget._GROUP == ACTIVATION_GROUP


def gptq(**fields: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, **fields}


def packed(**fields: object) -> dict[str, object]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4, **fields}}}}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, ""),
        (gptq(), ""),
        (gptq(desc_act=False, dynamic={"+:gate": {"bits": 8, "group_size": 32}, "-:head": {}}), ""),
        (gptq(desc_act=True), "act-order"),
        (gptq(group_size=-1), "not in groups of 32, 64, 128"),
        (gptq(dynamic={"+:gate": {"group_size": 16}}), "not in groups"),
        (packed(group_size=64), ""),
        (packed(group_size=128, actorder="weight"), ""),
        (packed(group_size=128, actorder="group"), "act-order"),
        (packed(strategy="channel"), "not in groups"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, ""),
    ],
)
def test_what_the_kernels_do_not_take_is_known_before(record: dict[str, object] | None, said: str) -> None:
    why = why_no_kernels(replace(RELEASED, quantization_config=record))
    assert said in why and bool(why) is bool(said)


def test_features_that_are_not_in_groups_run_module_by_module() -> None:
    narrow = replace(RELEASED, intermediate_size=16_000 + 32, quantization_config=gptq())
    assert "16,032 input features" in why_no_kernels(narrow)
    assert why_no_kernels(replace(narrow, quantization_config=None)) == ""


def test_lightning_layers_that_share_keys_run_module_by_module() -> None:
    shared = replace(RELEASED, lightning=replace(RELEASED.lightning, num_key_value_heads=2))
    assert "share keys" in why_no_kernels(shared)


def fitted_bytes(num_tokens: int, memory_bytes: int, options: PlanOptions) -> int:
    return plan_memory(RELEASED, num_tokens, fitted(RELEASED, num_tokens, memory_bytes, options)).total_bytes


@pytest.mark.parametrize("weights", WeightFormat)
@pytest.mark.parametrize("cache", CacheFormat)
def test_the_longest_context_fits_and_one_more_token_does_not(weights: WeightFormat, cache: CacheFormat) -> None:
    options = PlanOptions(weights, cache, stored=StoredWeights(weights, weight_bytes(RELEASED, weights)))
    for memory_bytes in (8 * GIB, 24 * GIB, 80 * GIB):
        longest = longest_context(RELEASED, memory_bytes, options)
        if longest == most_tokens(RELEASED, options):  # that the kernels choose from, whatever the memory
            assert options.is_fused and longest == 2**16 * 64 and memory_bytes > 8 * GIB
        else:
            assert fitted_bytes(longest + 1, memory_bytes, options) > memory_bytes
        if longest > 0:
            assert fitted_bytes(longest, memory_bytes, options) <= memory_bytes
            check_fits(plan_memory(RELEASED, longest, fitted(RELEASED, longest, memory_bytes, options)), memory_bytes)


# The context lengths of every size of card, with what is cached in which format.
@pytest.mark.parametrize(
    ("gibibytes", "tokens_k", "cache"),
    [
        (8, 256, CacheFormat.INT8),
        (12, 512, CacheFormat.BF16),
        (12, 1024, CacheFormat.INT8),
        (16, 1024, CacheFormat.BF16),
        (16, 2048, CacheFormat.INT8),
        (24, 2048, CacheFormat.INT8),
        (32, 2048, CacheFormat.BF16),
    ],
)
@pytest.mark.parametrize("math", ["int8", "bf16"])
def test_every_size_of_card_holds_the_context_that_is_promised(
    gibibytes: int, tokens_k: int, cache: CacheFormat, math: Math
) -> None:
    options, num_tokens = PlanOptions(WeightFormat.INT4, cache, math=math), tokens_k * 1024 + 256
    check_fits(
        plan_memory(RELEASED, num_tokens, fitted(RELEASED, num_tokens, gibibytes * GIB, options)), gibibytes * GIB
    )


def test_a_card_too_small_for_the_weights_holds_nothing() -> None:
    assert longest_context(RELEASED, 16 * GIB) == 0
    assert longest_context(RELEASED, 2**62) == 2**22
    assert longest_context(RELEASED, 2**62, PlanOptions(is_cuda=False)) == 2**31


def test_a_context_longer_than_kernels_choose_from_is_refused() -> None:
    check_length(RELEASED, 2**22, PlanOptions())
    with pytest.raises(RequestError, match="on a card 4,194,304 are supported"):
        check_length(RELEASED, 2**22 + 1, PlanOptions())
    check_length(RELEASED, 2**22 + 1, PlanOptions(has_kernels=False))


def test_the_largest_chunk_that_fits_is_taken_and_then_the_place_of_the_table() -> None:
    options = PlanOptions(WeightFormat.INT4)
    roomy = fitted(RELEASED, 2**16, 24 * GIB, options)
    assert (roomy.chunk_size, roomy.is_embedding_on_host) == (CUDA_CHUNKS[0], False)
    found = []
    for num_tokens in range(2**20, 2**21, 2**14):
        choice = fitted(RELEASED, num_tokens, 16 * GIB, options)
        if fitted_bytes(num_tokens, 16 * GIB, options) <= 16 * GIB:
            larger = [size for size in CUDA_CHUNKS if size > choice.chunk_size]
            for size in larger:
                tight = replace(choice, chunk_size=size, is_embedding_on_host=True)
                assert plan_memory(RELEASED, num_tokens, tight).total_bytes > 16 * GIB
            if choice.is_embedding_on_host:
                on_card = replace(choice, is_embedding_on_host=False)
                assert plan_memory(RELEASED, num_tokens, on_card).total_bytes > 16 * GIB
        else:
            assert (choice.chunk_size, choice.is_embedding_on_host) == (CUDA_CHUNKS[-1], True)
        found.append(choice.chunk_size)
    assert [size for size, _ in groupby(found)] == list(CUDA_CHUNKS)


def test_the_table_in_host_memory_takes_none_of_the_card() -> None:
    on_card = PlanOptions(WeightFormat.INT4)
    bytes_of = [
        plan_memory(RELEASED, 1, options).weight_bytes
        for options in (on_card, replace(on_card, is_embedding_on_host=True))
    ]
    assert bytes_of[0] - bytes_of[1] == 2 * 73448 * 4096
    assert fitted(RELEASED, 1, 11 * GIB, on_card).is_embedding_on_host  # a small card, with room or without
    tied = replace(RELEASED, tie_word_embeddings=True)
    assert not fitted(tied, 1, 8 * GIB, on_card).is_embedding_on_host  # the logits need it on the card


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(WeightFormat.INT4, is_cuda=False),
        PlanOptions(WeightFormat.INT4, has_kernels=False),
        PlanOptions(WeightFormat.NF4),
        PlanOptions(WeightFormat.FP16),
        PlanOptions(WeightFormat.FP32, CacheFormat.FP32),
        PlanOptions(WeightFormat.INT4, CacheFormat.FP32),
    ],
)
def test_what_runs_module_by_module_keeps_its_chunks_and_its_table(options: PlanOptions) -> None:
    assert not options.is_fused
    assert fitted(RELEASED, 2**16, 8 * GIB, options) == options
    assert fitted(RELEASED, 2**16, 8 * GIB, options, 77) == replace(options, chunk_size=77)


def test_a_chunk_size_that_was_asked_for_is_kept() -> None:
    choice = fitted(RELEASED, 2**16, 24 * GIB, PlanOptions(WeightFormat.INT4), 100)
    assert (choice.chunk_size, choice.is_embedding_on_host) == (100, False)
    assert fitted(RELEASED, 2**16, 6 * GIB, PlanOptions(WeightFormat.INT4), 100).is_embedding_on_host


def test_a_plan_that_does_not_fit_is_refused_with_its_parts() -> None:
    plan = plan_memory(RELEASED, 1024 * 1024)
    with pytest.raises(
        MemoryBudgetError, match=r"1,048,576 tokens needs .* \(weights 17.65, cache 8.31, .*16.00 GiB are free"
    ):
        check_fits(plan, 16 * GIB)
    with pytest.raises(MemoryBudgetError) as refused:
        check_fits(plan, 16 * GIB, "org/model")
    assert "salalocal plan org/model --ctx 1048576" in refused.value.hint


@pytest.mark.parametrize("num_tokens", [-1, 2**31 + 1, 1.5, True, "64k"])
def test_a_context_that_makes_no_sense_is_refused(num_tokens: object) -> None:
    with pytest.raises(RequestError, match="context should be"):
        plan_memory(RELEASED, num_tokens)  # type: ignore[arg-type]


def test_planning_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from salalocal.engine.budget import plan_memory; from salalocal.model.config import SalaConfig;"
        "plan_memory(SalaConfig.released(), 65536); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": _root()})


def _root() -> str:
    from pathlib import Path

    return str(Path(__file__).parents[2])


@pytest.mark.parametrize("num_tokens", [64, 200, 1000])
def test_the_plan_of_a_small_model_is_the_size_of_its_state(num_tokens: int) -> None:
    from salalocal.engine.engine import Engine
    from salalocal.model.sala import SalaModel

    config = small_config()
    model = SalaModel(config, dtype=torch.float32)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    state = Engine(model).new_state(num_tokens)
    plan: MemoryPlan = plan_memory(config, num_tokens, PlanOptions(WeightFormat.FP32, CacheFormat.FP32, is_cuda=False))
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    # The state rounds its room up to whole groups of rows, per kind of row.
    num_sparse = config.mixer_types.count("minicpm4")
    row = 4 * config.sparse.num_key_value_heads * config.sparse.head_dim * num_sparse
    assert plan.state_bytes - 2 * row <= state.nbytes <= plan.state_bytes + 4 * 64 * row
    assert math.isclose(plan.lightning_bytes, 2 * 3 * 8 * 8 * 4)
