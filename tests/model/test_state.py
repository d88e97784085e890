"""States in memory: growth, forks that never disturb each other, and where rows lie."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import small_config
from state_cases import Rows, empty_state, model_state, spec

from salalocal.errors import StateError
from salalocal.model import state as state_module
from salalocal.model.mixers.lightning import LightningState
from salalocal.model.sala import SalaModel
from salalocal.model.state import GrowingRows, KVCache, ModelState


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a row read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("capacity", (0, 1, 64, 65, 1000))
@pytest.mark.parametrize("num_tokens", (1, 2, 15, 16, 17, 63, 64, 65, 127, 1000))
def test_rows_come_back_in_order(capacity: int, num_tokens: int, seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(capacity=capacity), 3, 4)
    assert cache.rows.shape == (2, 0, 3, 4)
    first, second = draw(num_tokens), draw(1)
    cache.append(first)
    assert cache.num_rows == num_tokens and torch.equal(cache.rows, first)
    cache.append(second)
    assert torch.equal(cache.rows, torch.cat((first, second), dim=1))


def test_memory_grows_by_an_eighth_and_whole_groups(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(), 3, 4)
    row_bytes, sizes = 2 * 3 * 4 * 4, []
    for _ in range(900):
        cache.append(draw(1))
        sizes.append(cache.nbytes // row_bytes)
    assert sorted(set(sizes)) == [64, 128, 192, 256, 320, 384, 448, 512, 576, 704, 832, 960]
    assert GrowingRows(spec(capacity=100), 3, 4).nbytes == 128 * row_bytes


def test_forks_move_with_the_one_that_grows_so_that_nothing_is_held_twice(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(), 3, 4)
    rows = draw(60)
    cache.append(rows)
    behind = cache.fork()
    cache.append(draw(30))
    assert cache.num_rows == 90 and behind.num_rows == 60
    assert behind.rows.untyped_storage().data_ptr() == cache.rows.untyped_storage().data_ptr()
    assert torch.equal(behind.rows, rows)


def test_room_asked_for_is_used_without_moving(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(capacity=200), 3, 4)
    cache.append(draw(100))
    address = cache.rows.data_ptr()
    cache.append(draw(100))
    assert cache.rows.data_ptr() == address


def test_fork_is_cheap_and_the_first_to_append_goes_on_in_place(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(capacity=200), 3, 4)
    cache.append(draw(100))
    fork = cache.fork()
    assert fork.rows.data_ptr() == cache.rows.data_ptr()
    fork.append(draw(1))
    assert fork.rows.data_ptr() == cache.rows.data_ptr() and cache.num_rows == 100
    cache.append(draw(1))
    assert fork.rows.data_ptr() != cache.rows.data_ptr()


def test_after_a_dropped_fork_nothing_is_copied(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(capacity=200), 3, 4)
    cache.append(draw(100))
    before = cache.rows.clone()
    for _ in range(3):
        fork = cache.fork()
        fork.append(draw(5))
        assert fork.rows.data_ptr() == cache.rows.data_ptr() and torch.equal(cache.rows, before)
        del fork


def test_any_tree_of_forks_holds_what_lists_would_hold(seed: int) -> None:
    draw, choose = Rows(seed, batch=1, heads=1, dim=2), random.Random(seed)
    root = GrowingRows(spec(batch=1), 1, 2)
    living = [(root, root.rows.clone())]
    for _ in range(400):
        index = choose.randrange(len(living))
        cache, expected = living[index]
        action = choose.choice(("append", "append", "fork", "drop"))
        if action == "append":
            rows = draw(choose.randrange(1, 40))
            cache.append(rows)
            living[index] = (cache, torch.cat((expected, rows), dim=1))
        elif action == "fork":
            living.append((cache.fork(), expected))
        elif len(living) > 1:
            del living[index]
        del cache
        for held, wanted in living:
            assert torch.equal(held.rows, wanted)


def test_rows_of_another_shape_or_dtype_are_refused() -> None:
    cache = GrowingRows(spec(), 3, 4)
    for rows in (
        torch.zeros(2, 1, 4, 3),
        torch.zeros(1, 1, 3, 4),
        torch.zeros(2, 3, 4),
        torch.zeros(2, 1, 3, 4).half(),
    ):
        with pytest.raises(ValueError, match="cache takes"):
            cache.append(rows)
    assert cache.num_rows == 0


def test_gradients_flow_through_appended_rows(seed: int) -> None:
    draw, cache = Rows(seed), KVCache(spec(capacity=64), 3, 4)
    pieces = [draw(n).requires_grad_() for n in (5, 1, 80)]
    for piece in pieces:
        cache.append(piece, 2 * piece)
    (cache.keys.square().sum() + cache.values.sum()).backward()
    for piece in pieces:
        torch.testing.assert_close(piece.grad, 2 * piece.detach() + 2)


def test_a_state_made_in_inference_mode_goes_on_outside_of_it(seed: int) -> None:
    draw = Rows(seed)
    with torch.inference_mode():
        cache = KVCache(spec(), 3, 4)
        cache.append(draw(3), draw(3))
    with torch.no_grad():
        cache.append(draw(3), draw(3))
    assert cache.num_tokens == 6


def test_kv_cache_keeps_keys_and_values_apart(seed: int) -> None:
    draw, cache = Rows(seed), KVCache(spec(), 3, 4)
    keys, values = draw(70), draw(70)
    cache.append(keys, values)
    fork = cache.fork()
    fork.append(draw(1), draw(1))
    assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
    assert (cache.num_tokens, fork.num_tokens) == (70, 71)
    assert cache.nbytes == 2 * 128 * 2 * 3 * 4 * 4


def test_room_is_made_without_harm_to_forks(seed: int) -> None:
    draw, cache = Rows(seed), GrowingRows(spec(capacity=100), 3, 4)
    cache.append(draw(70))
    address = cache.storage.data_ptr()
    cache.make_room(128)  # there already
    assert cache.storage.data_ptr() == address and cache.storage.shape == (2, 3, 128, 4)
    ahead = cache.fork()
    new = draw(40)
    ahead.append(new)
    kept = ahead.rows.clone()
    cache.make_room(80)  # rows from 70 on are the fork's
    assert cache.storage.data_ptr() != ahead.storage.data_ptr() and cache.num_rows == 70
    cache.storage[:, :, 70:80] = 7
    cache.extend(10)
    assert torch.equal(cache.rows[:, :70], kept[:, :70]) and (cache.rows[:, 70:] == 7).all()
    assert torch.equal(ahead.rows, kept)
    cache.make_room(500)
    assert cache.storage.shape[2] >= 500 and (cache.rows[:, 70:] == 7).all()


def test_rows_without_room_are_not_counted(seed: int) -> None:
    cache = GrowingRows(spec(capacity=64), 3, 4)
    cache.append(Rows(seed)(60))
    with pytest.raises(ValueError, match="more than there is room for"):
        cache.extend(5)
    assert cache.num_rows == 60
    cache.extend(4)
    assert cache.num_rows == 64


def int8_cache() -> KVCache:
    return KVCache(replace(spec(batch=1, dtype=torch.bfloat16, capacity=64), is_int8=True), 3, 4)


def test_a_cache_in_8_bits_holds_codes_and_scales(seed: int) -> None:
    cache = int8_cache()
    assert cache.is_int8 and cache.nbytes == 2 * 64 * 3 * (4 + 2)
    assert {name: part.dtype for name, part in cache.storage.items()} == {
        "k": torch.int8, "v": torch.int8, "k_scales": torch.bfloat16, "v_scales": torch.bfloat16,
    }  # fmt: skip
    cache.make_room(10)
    for number, part in enumerate(cache.storage.values()):
        part[:, :, :10] = number + 1
    cache.extend(10)
    fork = cache.fork()
    assert fork.is_int8 and fork.num_tokens == 10
    fork.make_room(200)
    for part in fork.storage.values():
        part[:, :, 10:] = 9
    fork.extend(190)
    assert cache.num_tokens == 10 and {name: int(part.sum()) for name, part in cache.tensors().items()} == {
        "k": 120, "v": 240, "k_scales": 90, "v_scales": 120,
    }  # fmt: skip
    loaded = int8_cache().from_tensors({name: part.clone() for name, part in fork.tensors().items()}, 200)
    assert all(torch.equal(part, fork.tensors()[name]) for name, part in loaded.tensors().items())
    with pytest.raises(StateError, match="a layer holds"):
        int8_cache().from_tensors({name: fork.tensors()[name] for name in ("k", "v")}, 200)
    with pytest.raises(StateError, match="a layer holds"):
        KVCache(spec(batch=1, dtype=torch.bfloat16), 3, 4).from_tensors(fork.tensors(), 200)


def test_a_lent_state_is_settled_once_before_anyone_reads_it(seed: int, tmp_path: Path) -> None:
    readers: dict[str, Callable[[ModelState], object]] = {
        "fork": lambda state: state.fork(),
        "check_whole": lambda state: state.check_whole(),
        "save": lambda state: state.save(tmp_path / "read.safetensors"),
        "settle": lambda state: state.settle(),
    }
    for name, read in readers.items():
        state, calls = model_state(seed), []
        state.settle()  # nothing is lent
        state.lend(lambda calls=calls: calls.append(1))
        read(state)
        assert calls == [1], name
        read(state)
        assert calls == [1], f"{name}: settled twice"
        state.lend(lambda calls=calls: calls.append(2))
        state.settle()
        assert calls == [1, 2]


def test_what_settling_brings_up_to_date_is_what_is_saved_and_forked(seed: int, tmp_path: Path) -> None:
    state = model_state(seed)
    lightning = state.layers[1]
    assert isinstance(lightning, LightningState)
    wanted = lightning.matrix + 3
    state.lend(lambda: lightning.advance(wanted, 0))
    fork = state.fork()
    assert torch.equal(fork.layers[1].tensors()["s"], wanted)
    state.lend(lambda: lightning.advance(wanted + 1, 0))
    state.save(tmp_path / "read.safetensors")
    loaded, _ = ModelState.load(tmp_path / "read.safetensors", empty_state())
    assert torch.equal(loaded.layers[1].tensors()["s"], wanted + 1)
    assert torch.equal(fork.layers[1].tensors()["s"], wanted)


def test_forks_of_a_model_state_go_their_own_ways(seed: int) -> None:
    state = model_state(seed)
    before = {name: tensor.clone() for layer in state.layers for name, tensor in layer.tensors().items()}
    fork = state.fork()
    cache, lightning = fork.layers
    assert isinstance(cache, KVCache) and isinstance(lightning, LightningState)
    cache.append(*(Rows(seed, dtype=torch.bfloat16)(1) for _ in range(2)))
    lightning.advance(lightning.matrix + 1, 1)
    fork.num_tokens += 1
    assert state.num_tokens == 70 and [layer.num_tokens for layer in state.layers] == [70, 70]
    after = {name: tensor for layer in state.layers for name, tensor in layer.tensors().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert state.nbytes == sum(layer.nbytes for layer in state.layers)


def test_rows_that_are_claimed_are_left_alone_by_forks(seed: int) -> None:
    draw, rows = Rows(seed), GrowingRows(spec(capacity=64), 3, 4)
    rows.append(draw(10))
    fork = rows.fork()
    rows.claim(30)
    storage = rows.storage
    storage[:, :, 10:12] = 7.0  # as a captured step writes, which nobody counts yet
    fork.append(draw(100))
    assert rows.storage is storage and (storage[:, :, 10:12] == 7.0).all() and fork.num_rows == 110
    rows.extend(2)
    rows.release()
    late = rows.fork()
    late.append(draw(1))
    assert late.storage is storage and rows.num_rows == 12


@dataclass
class Memory:
    """Host memory where there is no card: what was asked for, and how often the card was waited for."""

    made: list[torch.Tensor] = field(default_factory=list)
    num_waits: int = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.made.append(torch.full(shape, 99, dtype=dtype))
        return self.made[-1]

    def wait(self) -> None:
        self.num_waits += 1

    def holds(self, rows: torch.Tensor) -> bool:
        return any(rows.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for made in self.made)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    monkeypatch.setattr(state_module, "page_locked_empty", made.empty)
    monkeypatch.setattr(state_module, "wait_for_card", made.wait)
    return made


@pytest.mark.parametrize("is_int8", [False, True])
def test_keys_and_values_lie_in_host_memory_and_nothing_else(
    is_int8: bool, memory: Memory, tmp_path: Path, seed: int
) -> None:
    config = small_config()
    model = SalaModel(config, dtype=torch.bfloat16)
    model.init_weights(generator=torch.Generator().manual_seed(seed))
    ids = torch.randint(0, config.vocab_size, (1, 150), generator=torch.Generator().manual_seed(seed))
    state, usual = (model.new_state(1, 100, is_int8=is_int8, is_kv_on_host=on_host) for on_host in (True, False))
    with torch.inference_mode():
        for start, end in ((0, 90), (90, 149)):  # the second outgrows the room
            assert torch.equal(model(ids[:, start:end], state), model(ids[:, start:end], usual))
        assert memory.num_waits > 0  # before rows were moved to the larger buffers
        state.save(tmp_path / "read.safetensors")
        restored, _ = ModelState.load(
            tmp_path / "read.safetensors", model.new_state(1, is_int8=is_int8, is_kv_on_host=True)
        )
        from_card, _ = ModelState.load(tmp_path / "read.safetensors", model.new_state(1, is_int8=is_int8))
        fork = state.fork()
        expected = model(ids[:, 149:], usual)
        for each in (state, fork, restored, from_card):
            assert torch.equal(model(ids[:, 149:], each), expected)
    for each, is_on_host in ((state, True), (fork, True), (restored, True), (from_card, False), (usual, False)):
        for layer in each.layers:
            for name, tensor in layer.tensors().items():
                is_cached = name in ("k", "v", "k_scales", "v_scales")
                assert memory.holds(tensor) is (is_on_host and is_cached), name


def test_the_card_is_waited_for_before_its_rows_are_read(memory: Memory, tmp_path: Path, seed: int) -> None:
    rows, draw = GrowingRows(spec(capacity=64), 3, 4, is_on_host=True), Rows(seed)
    rows.append(draw(60))
    assert memory.num_waits == 0
    fork = rows.fork()
    rows.append(draw(60))
    assert memory.num_waits == 1 and torch.equal(fork.rows, rows.rows[:, :60])
    model_state(seed).save(tmp_path / "read.safetensors")
    assert memory.num_waits == 2
