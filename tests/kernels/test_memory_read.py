"""Reading for bandwidth: definition = reference = kernel, and every word counts."""

import pytest
import torch

from salalocal.kernels.memory_read import (
    PIECE,
    read_sums,
    read_sums_definition,
    read_sums_reference,
    read_sums_triton,
)


@pytest.mark.parametrize("pieces", [1, 3])
def test_three_forms_agree(seed: int, pieces: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (pieces * PIECE,), generator=generator, dtype=torch.int64).to(torch.int32)
    expected = read_sums_definition(words)
    assert expected.shape == (pieces,)
    assert torch.equal(read_sums_reference(words), expected)
    assert torch.equal(read_sums_triton(words), expected)
    assert torch.equal(read_sums(words), expected)


def test_no_word_is_left_out(seed: int) -> None:
    """A kernel that skips words would measure a bandwidth that is not there."""
    words = torch.zeros(2 * PIECE, dtype=torch.int32)
    places = torch.randint(0, 2 * PIECE, (4,), generator=torch.Generator().manual_seed(seed)).unique().tolist()
    for place in [*places, 0, PIECE - 1, PIECE, 2 * PIECE - 1]:
        words.zero_()
        words[place] = 7
        assert read_sums_triton(words).tolist() == [7 * (place < PIECE), 7 * (place >= PIECE)]


def test_words_that_do_not_fill_pieces_are_refused() -> None:
    for words in (torch.zeros(PIECE + 1, dtype=torch.int32), torch.zeros(PIECE), torch.zeros(2, PIECE).int()):
        with pytest.raises(ValueError, match="whole pieces"):
            read_sums(words)
