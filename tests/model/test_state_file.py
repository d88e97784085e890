"""States in files: they come back bit by bit or not at all."""

import json
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from state_cases import assert_same, empty_state, model_state

from salalocal.errors import StateError
from salalocal.model import state as state_module
from salalocal.model.state import ModelState


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that a row read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
