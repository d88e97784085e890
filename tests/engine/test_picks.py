"""Recorded picks: those of every row that drew a token, wherever it was fed, and of no other."""

import pytest
import torch
from checkpoint_cases import small_config
from torch import Tensor

from salalocal.engine import engine as engine_module
from salalocal.engine import picks as picks_module
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.picks import Picks, first_picking, newest_picks
from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.mixers import sparse
from salalocal.model.sala import SalaModel

FIRST = 63  # dense_len is 64, and five blocks of eight tokens are picked
CONFIG = small_config()


@pytest.fixture
def engine(seed: int) -> Engine:
    model = SalaModel(CONFIG, dtype=torch.float32)
    model.init_weights(generator=torch.Generator().manual_seed(seed))
    return Engine(model, EngineConfig(32))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """What the block choice gave, layer by layer, for every position."""
    found: dict[int, list[Tensor]] = {}
    choose = sparse.block_topk

    def watched(q: Tensor, k1: Tensor, k2: Tensor, first: int, *rest: object) -> Tensor:
        blocks: Tensor = choose(q, k1, k2, first, *rest)  # type: ignore[arg-type]
        for row in range(blocks.shape[1]):
            found.setdefault(first + row, []).append(blocks[0, row].clone())
        return blocks

    monkeypatch.setattr(sparse, "block_topk", watched)
    return found


def random_ids(seed: int, length: int) -> list[int]:
    return torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_are(picks: Picks, chosen: dict[int, list[Tensor]], positions: range) -> None:
    assert picks.positions.tolist() == list(positions)
    for row, weights, position in zip(picks.blocks, picks.weights, positions, strict=True):
        assert torch.equal(row.long(), torch.stack(chosen[position])), position
        is_free = (row >= 1) & (row < position // 8 - 2)
        assert torch.equal(weights.isfinite(), is_free), position


def answer(engine: Engine, ids: list[int], count: int) -> "engine_module.Generation":
    state = engine.new_state(len(ids))
    logits = engine.prefill(ids, state)
    assert logits is not None
    generation = engine.generate(state, logits, SamplingParams(max_tokens=count))
    list(generation)
    return generation


@pytest.mark.parametrize("length", [90, 96, 97])
def test_the_rows_of_an_answer_begin_with_the_last_of_the_prompt(
    engine: Engine, chosen: dict[int, list[Tensor]], length: int, seed: int
) -> None:
    found = answer(engine, random_ids(seed, length), 6).picks()
    assert_are(found.picks, chosen, range(length - 1, length + 5))
    assert (found.num_tokens, found.num_dense) == (6, 0)
    assert found.picks.blocks.shape == (6, CONFIG.mixer_types.count("minicpm4"), 2, 5)


@pytest.mark.parametrize("length", [40, 62, 63, 64])
def test_rows_that_read_everything_pick_nothing(
    engine: Engine, chosen: dict[int, list[Tensor]], length: int, seed: int
) -> None:
    found = answer(engine, random_ids(seed, length), 6).picks()
    first = max(FIRST, length - 1)
    assert_are(found.picks, chosen, range(first, length + 5) if first < length + 5 else range(0))
    assert found.num_dense + len(found.picks) == found.num_tokens == 6


def test_of_a_long_answer_the_last_rows_are_known(
    engine: Engine, chosen: dict[int, list[Tensor]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picks_module, "RING_ROWS", 4)
    monkeypatch.setattr(engine_module, "RING_ROWS", 4)
    found = answer(engine, random_ids(seed, 80), 9).picks()
    assert_are(found.picks, chosen, range(84, 88))
    monkeypatch.undo()
    whole = answer(engine, random_ids(seed, 80), 9).picks().picks
    torch.testing.assert_close(whole.weights[5:], found.picks.weights)


def test_nothing_drawn_is_nothing_picked_and_a_fork_goes_on_where_it_was_made(
    engine: Engine, chosen: dict[int, list[Tensor]], seed: int
) -> None:
    ids = random_ids(seed, 90)
    state = engine.new_state(len(ids))
    logits = engine.prefill(ids, state)
    assert logits is not None
    idle = engine.generate(state, logits, SamplingParams())
    assert len(idle.picks().picks) == 0 == idle.picks().num_tokens
    fork = engine.generate(state.fork(), logits, SamplingParams(max_tokens=2))
    list(fork)
    assert_are(fork.picks().picks, chosen, range(89, 91))


def test_a_state_that_was_loaded_does_not_know_its_newest_picks(engine: Engine, seed: int, tmp_path) -> None:
    ids = random_ids(seed, 90)
    state = engine.new_state(len(ids))
    logits = engine.prefill(ids, state)
    assert logits is not None and newest_picks(state) is not None
    state.save(tmp_path / "state")
    loaded, _ = type(state).load(tmp_path / "state", engine.new_state())
    assert newest_picks(loaded) is None
    generation = engine.generate(loaded, logits, SamplingParams(max_tokens=3))
    list(generation)
    found = generation.picks()
    assert found.picks.positions.tolist() == [90, 91] and found.num_tokens == 3 and found.num_dense == 0


def test_what_would_be_picked_next_leaves_the_state_alone(
    engine: Engine, chosen: dict[int, list[Tensor]], seed: int
) -> None:
    ids, more = random_ids(seed, 90), random_ids(seed + 1, 5)
    state = engine.new_state(200)
    engine.prefill(ids, state)
    before = {name: tensor.clone() for layer in state.layers for name, tensor in layer.tensors().items()}
    storage = [tensor.data_ptr() for layer in state.layers for tensor in layer.tensors().values()]
    found = engine.next_picks(more, state)
    assert state.num_tokens == 90
    assert_are(found, chosen, range(94, 95))
    after = {name: tensor for layer in state.layers for name, tensor in layer.tensors().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    chosen.clear()
    other = engine.next_picks(more[:3], state)  # writes where the first ones stood
    assert_are(other, chosen, range(92, 93))
    assert storage == [tensor.data_ptr() for layer in state.layers for tensor in layer.tensors().values()]
    assert len(engine.next_picks(random_ids(seed, 20), engine.new_state(30))) == 0


def test_where_picking_begins(engine: Engine) -> None:
    assert first_picking(CONFIG, engine.new_state()) == FIRST
    assert first_picking(CONFIG, engine.new_state(0, engine_module.SwitchRule.ALWAYS)) == 40
