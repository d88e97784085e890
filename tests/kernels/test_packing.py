"""Packing: the words are what the formula says, and every code comes back."""

import pytest
import torch
from quantized_cases import unpacked_by_hand

from salalocal.kernels.packing import pack_codes, unpack_codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(8,), (3, 32), (2, 5, 64)])
def test_words_hold_the_first_code_lowest(seed: int, bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (*shape[:-1], shape[-1] * bits // 32)
    assert unpacked_by_hand(words, bits).tolist() == codes.tolist()
    assert torch.equal(unpack_codes(words, bits), codes)
    for dtype in (torch.float32, torch.int32):
        unpacked = unpack_codes(words, bits, dtype)
        assert unpacked.dtype == dtype and torch.equal(unpacked, codes.to(dtype))


def test_a_known_word() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 15], dtype=torch.uint8)
    assert pack_codes(codes, 4).item() == 0xF7654321 - 2**32
    assert pack_codes(codes[4:], 8).item() == 0x0F070605


@pytest.mark.parametrize("bits", [4, 8])
def test_views_are_packed_and_unpacked_like_copies(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (16, 24), generator=generator, dtype=torch.uint8)
    words = pack_codes(codes.t(), bits)
    assert torch.equal(words, pack_codes(codes.t().contiguous(), bits))
    assert torch.equal(unpack_codes(words.t().contiguous().t(), bits), codes.t())


def test_unpacking_to_octets_never_hands_out_the_words_themselves() -> None:
    words = torch.zeros(2, 4, dtype=torch.int32)
    unpack_codes(words, 8).fill_(1)
    assert not words.any()


def test_what_cannot_be_packed_is_refused() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    for wrong in (codes.int(), codes[:, :6]):
        with pytest.raises(ValueError, match="whole words"):
            pack_codes(wrong, 4)
    for bits in (2, 3, 16):
        with pytest.raises(ValueError, match=f"{bits} bits"):
            pack_codes(codes, bits)
        with pytest.raises(ValueError, match=f"{bits} bits"):
            unpack_codes(codes.int(), bits)
    with pytest.raises(ValueError, match="needed is int32"):
        unpack_codes(codes, 4)
