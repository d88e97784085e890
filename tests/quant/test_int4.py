"""Integer weights: the formula, the GPTQ tensors bit by bit, and what is refused."""

import pytest
import torch
from quantized_cases import gptq_by_hand, gptq_record, random_weight

from salalocal.errors import CheckpointError
from salalocal.quant.int4 import IntScheme, IntWeight, PackedWeight, from_gptq, group_numbers, to_gptq

SCHEMES = [IntScheme(4, 16), IntScheme(4, 128), IntScheme(8, 32), IntScheme(4, 40), IntScheme(8, 4096)]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_tensors_mean_what_the_weight_means(
    seed: int, scheme: IntScheme, scale_dtype: torch.dtype, act_order: bool
) -> None:
    weight = random_weight(24, 128, scheme, seed, act_order, scale_dtype)
    tensors = to_gptq(weight)
    assert [tensor.dtype for tensor in tensors.values()] == [torch.int32, torch.int32, scale_dtype, torch.int32]
    assert tensors["qweight"].shape == (128 * scheme.bits // 32, 24)
    assert tensors["qzeros"].shape == (scheme.num_groups(128), 24 * scheme.bits // 32)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    exact = torch.from_numpy(gptq_by_hand(tensors, zero_offset=1))
    assert torch.equal(weight.dequantize(torch.float64), exact)
    assert torch.equal(weight.dequantize(), exact.float())

    back = from_gptq(tensors, gptq_record(scheme))
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert back.scales.dtype == scale_dtype and back.scheme == scheme
    if scheme.num_groups(128) > 1:
        assert (back.group_index is not None) == act_order
    assert torch.equal(back.groups, weight.groups)


def test_version_2_stores_the_zero_point_itself(seed: int) -> None:
    weight = random_weight(16, 64, IntScheme(4, 32), seed)
    tensors = to_gptq(weight)
    tensors["qzeros"] = tensors["qzeros"] + 0x11111111
    back = from_gptq(tensors, gptq_record(weight.scheme, checkpoint_format="gptq_v2"))
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(torch.from_numpy(gptq_by_hand(tensors, zero_offset=0)).float(), weight.dequantize())
    with pytest.raises(CheckpointError, match="not symmetric"):
        from_gptq(tensors, gptq_record(weight.scheme))


def test_a_matrix_of_a_mixed_folder_is_read_by_its_own_shapes(seed: int) -> None:
    weight = random_weight(16, 96, IntScheme(8, 24), seed)
    back = from_gptq(to_gptq(weight), gptq_record(IntScheme(4, 128)))
    assert back.scheme == weight.scheme and torch.equal(back.dequantize(), weight.dequantize())


def test_what_cannot_be_read_is_refused(seed: int) -> None:
    tensors = to_gptq(random_weight(16, 64, IntScheme(4, 32), seed))
    record = gptq_record(IntScheme(4, 32))
    zeros = tensors["qzeros"].clone()
    zeros[1, 0] += 1
    group_index = tensors["g_idx"].clone()
    group_index[5] = 2
    for changed, asked, reason in (
        ({"qzeros": zeros}, record, "not symmetric"),
        ({"g_idx": group_index}, record, "g_idx goes from 0 to 2, groups are 2"),
        ({"g_idx": -group_index}, record, "g_idx goes from -2 to 0"),
        ({}, {**record, "checkpoint_format": "marlin"}, "marlin"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            from_gptq({**tensors, **changed}, asked)


def test_packing_and_unpacking_change_nothing(seed: int) -> None:
    for scheme in SCHEMES:
        weight = random_weight(8, 80, scheme, seed, act_order=True)
        back = weight.packed().unpacked()
        assert torch.equal(back.codes, weight.codes) and torch.equal(back.dequantize(), weight.dequantize())


def test_weights_of_the_wrong_shape_are_a_callers_mistake() -> None:
    codes, scales = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2)
    with pytest.raises(ValueError, match="codes are"):
        IntWeight(codes.int(), scales, 4, 16)
    with pytest.raises(ValueError, match="scales are"):
        IntWeight(codes, scales, 4, 8)
    with pytest.raises(ValueError, match="scales are"):
        IntWeight(codes, scales.int(), 4, 16)
    with pytest.raises(ValueError, match="group_index"):
        IntWeight(codes, scales, 4, 16, group_numbers(31, 16))
    words = torch.zeros(8, 4, dtype=torch.int32)
    for wrong_words, wrong_scales, index in (
        (words.long(), scales, None),
        (words[:, :3], torch.ones(8, 3), None),
        (words, scales[:7], None),
        (words, scales, group_numbers(24, 16)),
    ):
        with pytest.raises(ValueError, match=r"words are|scales are|group_index is"):
            PackedWeight(wrong_words, wrong_scales, 4, 16, index)
    tensors = to_gptq(IntWeight(codes, scales, 4, 16))
    with pytest.raises(ValueError, match="scales are"):
        from_gptq({**tensors, "scales": tensors["scales"][:, :7]}, gptq_record(IntScheme(4, 16)))
    for wrong in ((3, 16), (4, 0)):
        with pytest.raises(ValueError):
            IntScheme(*wrong)
    odd = IntWeight(torch.zeros(6, 32, dtype=torch.uint8), torch.ones(6, 2), 4, 16)
    assert not odd.scheme.can_pack(6, 32) and odd.scheme.can_pack(8, 32)
    with pytest.raises(ValueError, match="whole words"):
        to_gptq(odd)


def test_pieces_of_rows_join_to_the_whole(seed: int) -> None:
    for act_order in (False, True):
        whole = random_weight(40, 96, IntScheme(4, 32), seed, act_order)
        pieces = [
            IntWeight(codes, scales, 4, 32, whole.group_index)
            for codes, scales in zip(whole.codes.split(16), whole.scales.split(16), strict=True)
        ]
        back = IntWeight.joined(pieces)
        assert torch.equal(back.codes, whole.codes) and torch.equal(back.dequantize(), whole.dequantize())


def test_a_matrix_takes_no_more_memory_than_its_scheme_says(seed: int) -> None:
    for scheme in SCHEMES:
        packed = random_weight(24, 128, scheme, seed, True, torch.float32).packed()
        assert packed.group_index is not None
        held = packed.words.nbytes + packed.scales.nbytes + packed.group_index.nbytes
        assert held == scheme.num_bytes(24, 128)
