"""Chunks lie on the absolute grid, and a reading can be stopped between two of them."""

import math

import pytest
import torch
from checkpoint_cases import small_config
from hypothesis import given
from hypothesis import strategies as st

from salalocal.engine.prefill import as_ids, chunk_ends, read_chunks
from salalocal.errors import NumericError, RequestError
from salalocal.model.sala import SalaModel


def small_model(seed: int) -> SalaModel:
    model = SalaModel(small_config(), dtype=torch.float32)
    model.init_weights(generator=torch.Generator().manual_seed(seed))
    return model.eval()


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 70))
def test_chunks_end_at_multiples_and_at_the_end(first: int, count: int, size: int) -> None:
    ends = list(chunk_ends(first, count, size))
    whole = [position for position in range(first + 1, first + count) if position % size == 0]
    assert ends == [*whole, *([first + count] if count else [])]


def test_chunks_of_a_reading_that_starts_off_the_grid() -> None:
    assert list(chunk_ends(5, 20, 8)) == [8, 16, 24, 25]
    assert list(chunk_ends(8, 8, 8)) == [16]


@torch.inference_mode()
def test_each_chunk_is_yielded_when_the_state_holds_it(seed: int) -> None:
    model = small_model(seed)
    ids = torch.randint(0, 96, (41,), generator=torch.Generator().manual_seed(seed))
    state = model.new_state()
    model(ids[None, :5], state)
    sizes = [(hidden.shape[1], state.num_tokens) for hidden in read_chunks(model, ids[5:], state, 16)]
    assert sizes == [(11, 16), (16, 32), (9, 41)]
    expected = model(ids[None], model.new_state())[:, -9:]
    state = model.new_state()
    *_, last = read_chunks(model, ids, state, 16)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_cancel_is_asked_for_before_each_chunk(seed: int) -> None:
    model = small_model(seed)
    ids = torch.zeros(40, dtype=torch.int64)
    for stop_at in range(4):
        asked: list[int] = []
        state = model.new_state()

        def is_cancelled(asked: list[int] = asked, stop_at: int = stop_at) -> bool:
            asked.append(1)
            return len(asked) > stop_at

        chunks = list(read_chunks(model, ids, state, 16, is_cancelled))
        assert len(chunks) == min(stop_at, 3)
        assert state.num_tokens == min(16 * stop_at, 40)


@torch.inference_mode()
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_any_layer_stops_the_reading_and_names_the_tokens(seed: int, bad: float) -> None:
    ids = torch.arange(40) + 10
    for name in (
        "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.up_proj.weight", "model.norm.weight",
    ):  # fmt: skip
        model = small_model(seed)
        weight = model.get_parameter(name)
        if name == "model.embed_tokens.weight":
            weight[10 + 20] = bad  # the token at position 20, in the second chunk
        else:
            weight.view(-1)[3] = bad
        state, seen = model.new_state(), 0
        with pytest.raises(NumericError, match="hidden states of tokens"):
            for hidden in read_chunks(model, ids, state, 16):
                seen += hidden.shape[1]
        assert seen == (16 if name == "model.embed_tokens.weight" else 0), name


@pytest.mark.parametrize("ids", [[], [[1, 2]], [1.5], [-1], [96], [2**40], [True], "abc", None, [1, "a"], [2**70]])
def test_ids_that_make_no_sense_are_refused(ids: object) -> None:
    with pytest.raises(RequestError, match="ids"):
        as_ids(ids, 96, torch.device("cpu"))  # type: ignore[arg-type]


def test_ids_come_as_lists_tuples_and_tensors() -> None:
    for ids in ([1, 95], (1, 95), torch.tensor([1, 95]), torch.tensor([1, 95], dtype=torch.int32)):
        found = as_ids(ids, 96, torch.device("cpu"))
        assert found.dtype == torch.int64 and found.tolist() == [1, 95]
