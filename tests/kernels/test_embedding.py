"""Rows of the embedding table: definition = reference = kernel, and what an id outside the table does."""

import pytest
import torch

from salalocal.kernels.embedding import embed, embed_definition, embed_reference, embed_triton


def draw(seed: int, entries: int, channels: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(entries, channels + 3, generator=generator)[:, 1 : channels + 1]  # rows lie apart
    return table, torch.randint(entries, (tokens,), generator=generator)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize(("channels", "tokens"), [(64, 1), (100, 7), (1500, 3)])
def test_forms_give_the_same_bits(channels: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    table, ids = draw(seed, 50, channels, tokens)
    table = table.to(dtype)
    expected = embed_definition(table, ids, 12.0)
    assert expected.dtype == dtype and expected.shape == (tokens, channels)
    for form in (embed_reference, embed, embed_triton):
        assert torch.equal(form(table, ids, 12.0), expected), form
    assert torch.equal(embed(table, ids[:0], 12.0), expected[:0]) and len(embed_triton(table, ids[:0], 1.0)) == 0


def test_ids_outside_the_table_show_and_nothing_else_is_written(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids = draw(seed, 20, 100, 4)
    ids[1], ids[2] = 20, -1
    room = torch.full((400 + 128,), 7.0)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: room[64:-64].view(shape))
    found = embed_triton(table, ids, 0.5)
    assert torch.equal(found[[0, 3]], table[ids[[0, 3]]] * 0.5) and bool(found[1:3].isnan().all())
    assert bool(room[:64].eq(7).all()) and bool(room[-64:].eq(7).all())
    with pytest.raises(IndexError):
        embed(table, torch.tensor([20]), 1.0)


def test_gradients_reach_the_table(seed: int) -> None:
    table, ids = draw(seed, 20, 8, 4)
    table = table.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda table: embed(table, ids, 3.0), (table,))


def test_what_does_not_fit_is_named() -> None:
    for table, ids in [
        (torch.ones(4, 8), torch.ones(3)),
        (torch.ones(4, 8), torch.ones(1, 3, dtype=torch.int64)),
        (torch.ones(8, 4).T, torch.ones(3, dtype=torch.int64)),
    ]:
        with pytest.raises(ValueError, match="adjacent channels"):
            embed_triton(table, ids, 1.0)
