"""States: growth, forks that never disturb each other, and files that come back bit by bit or not at all."""

import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import small_config
from safetensors import safe_open
from safetensors.torch import save_file

from salalocal.errors import StateError
from salalocal.model import state as state_module
from salalocal.model.mixers.lightning import LightningState
from salalocal.model.sala import SalaModel
from salalocal.model.state import GrowingRows, KVCache, ModelState, StateSpec


def spec(batch: int = 2, capacity: int = 0, dtype: torch.dtype = torch.float32) -> StateSpec:
    return StateSpec(batch_size=batch, capacity=capacity, sparse_from=7, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a row read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Rows:
    """Random rows of one shape, from one seed."""

    def __init__(self, seed: int, batch: int = 2, heads: int = 3, dim: int = 4, dtype: torch.dtype = torch.float32):
        self._generator = torch.Generator().manual_seed(seed)
        self._shape, self._dtype = (batch, heads, dim), dtype

    def __call__(self, num: int) -> torch.Tensor:
        batch, heads, dim = self._shape
        return torch.randn(batch, num, heads, dim, generator=self._generator).to(self._dtype)


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


def model_state(seed: int, num_tokens: int = 70, digest: str = "a" * 64) -> ModelState:
    """A state of one attention layer and one lightning layer, as a model would leave it."""
    draw, cache = Rows(seed, dtype=torch.bfloat16), KVCache(spec(dtype=torch.bfloat16, capacity=100), 3, 4)
    cache.append(draw(num_tokens), draw(num_tokens))
    matrix = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    layers = (cache, LightningState(matrix, num_tokens))
    return ModelState(layers, num_tokens=num_tokens, sparse_from=7, config_digest=digest)


def empty_state(digest: str = "a" * 64, sparse_from: int = 7, heads: int = 3) -> ModelState:
    cache = KVCache(spec(dtype=torch.bfloat16), heads, 4)
    layers = (cache, LightningState(torch.zeros(2, 3, 4, 4), 0))
    return ModelState(layers, num_tokens=0, sparse_from=sparse_from, config_digest=digest)


def assert_same(one: ModelState, other: ModelState) -> None:
    assert (one.num_tokens, one.sparse_from, one.config_digest) == (
        other.num_tokens,
        other.sparse_from,
        other.config_digest,
    )
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.num_tokens == right.num_tokens
        mine, theirs = left.tensors(), right.tensors()
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("num_tokens", (0, 1, 64, 70))
def test_saved_and_loaded_it_is_the_same(num_tokens: int, tmp_path: Path, seed: int) -> None:
    state, path = model_state(seed, num_tokens), tmp_path / "read.safetensors"
    state.save(path, {"documents": "ab\x1b", "model": "x"})
    like = empty_state()
    loaded, metadata = ModelState.load(path, like)
    assert_same(loaded, state)
    assert like.num_tokens == 0 and metadata == {"documents": "ab\x1b", "model": "x"}


def test_a_loaded_state_is_its_own_memory(tmp_path: Path, seed: int) -> None:
    state, path = model_state(seed), tmp_path / "read.safetensors"
    state.save(path)
    loaded, _ = ModelState.load(path, empty_state())
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(loaded, state)


def test_file_is_private_alone_and_replaced_whole(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "read.safetensors"
    model_state(seed).save(path)
    first = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    model_state(seed, 71).save(path)
    assert path.read_bytes() != first and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["read.safetensors"]


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, seed: int, monkeypatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        steps.append("fsync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync file")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        steps.append("replace beside" if self.parent == target.parent else "replace from elsewhere")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    model_state(seed).save(tmp_path / "x")
    assert steps == ["fsync file", "replace beside", "fsync folder"]


@pytest.mark.parametrize("failing", ("fsync", "replace", "mkstemp"))
def test_a_failed_save_leaves_the_old_file_and_no_other(failing: str, tmp_path: Path, seed: int, monkeypatch) -> None:
    path = tmp_path / "read.safetensors"
    old = model_state(seed)
    old.save(path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    where = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "mkstemp": "tempfile.mkstemp"}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(StateError, match="No space left"):
            model_state(seed, 71).save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["read.safetensors"]
    assert_same(ModelState.load(path, empty_state())[0], old)


def test_a_folder_that_is_not_there_is_a_state_error(tmp_path: Path, seed: int) -> None:
    with pytest.raises(StateError, match="could not be saved"):
        model_state(seed).save(tmp_path / "nowhere" / "x")
    with pytest.raises(StateError, match="cannot be read"):
        ModelState.load(tmp_path / "x", empty_state())


def test_flipped_bits_are_found(tmp_path: Path, seed: int) -> None:
    path, choose = tmp_path / "read.safetensors", random.Random(seed)
    state = model_state(seed, 2)
    state.save(path, {"note": "one"})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    bits = [*range(64), *(8 * byte + choose.randrange(8) for byte in range(8, header))]
    for bit in bits + choose.sample(range(8 * header, 8 * len(whole)), 100):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(StateError):
            ModelState.load(path, empty_state())


def test_truncations_are_found(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "read.safetensors"
    model_state(seed, 2).save(path)
    whole = path.read_bytes()
    for length in [*range(10), *random.Random(seed).sample(range(len(whole)), 300), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StateError):
            ModelState.load(path, empty_state())


def test_states_of_another_model_rule_or_shape_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "read.safetensors"
    model_state(seed).save(path)
    with pytest.raises(StateError, match="another model"):
        ModelState.load(path, empty_state(digest="b" * 64))
    with pytest.raises(StateError, match="first sparse row is 7, in this run 0"):
        ModelState.load(path, empty_state(sparse_from=0))
    with pytest.raises(StateError, match=r"tensor k is \(2, 70, 3, 4\)"):
        ModelState.load(path, empty_state(heads=2))
    fewer = empty_state()
    fewer.layers = fewer.layers[:1]
    with pytest.raises(StateError, match="unknown tensors"):
        ModelState.load(path, fewer)
    more = empty_state()
    more.layers = (*more.layers, more.layers[1])
    with pytest.raises(StateError, match="a layer holds"):
        ModelState.load(path, more)


def test_a_file_of_other_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "salalocal-state-1"}):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(StateError, match="damaged or of another version"):
            ModelState.load(path, empty_state())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_tokens", "-1"),
        ("num_tokens", "9" * 30),
        ("num_tokens", "x"),
        ("num_tokens", None),
        ("config", None),
        ("sparse_from", "7.0"),
        ("metadata", "[" * 100_000),
        ("metadata", "[]"),
        ("metadata", '{"a": 1}'),
    ],
)
def test_a_forged_header_with_a_right_hash_is_refused(
    name: str, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    path, save_as_made = tmp_path / "read.safetensors", state_module._write_durably

    def forge(target: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        del header["sha256"], header[name]
        header |= {} if value is None else {name: value}
        save_as_made(target, tensors, header | {"sha256": state_module._content_hash(header, tensors)})

    monkeypatch.setattr(state_module, "_write_durably", forge)
    model_state(seed).save(path)
    with pytest.raises(StateError):
        ModelState.load(path, empty_state())


def test_metadata_stands_in_the_header_for_other_tools(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "read.safetensors"
    model_state(seed).save(path, {"note": "one"})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["num_tokens"] == "70" and json.loads(header["metadata"]) == {"note": "one"}


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
