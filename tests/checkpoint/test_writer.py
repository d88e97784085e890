"""Written folders are whole or not there, the same each time, and synced before they are named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_cases import random_tensors, small_config, written

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from salalocal.checkpoint.writer import write_checkpoint
from salalocal.errors import CheckpointError

CONFIG = small_config()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, seed: int, max_shard_bytes: int) -> None:
    tensors = random_tensors(CONFIG, seed)
    first = contents(written(tmp_path / "a", CONFIG, tensors, max_shard_bytes))
    assert first == contents(written(tmp_path / "b", CONFIG, tensors, max_shard_bytes))
    assert first == contents(written(tmp_path / "a", CONFIG, tensors, max_shard_bytes))  # over itself


def test_shards_keep_to_the_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, 1)
    written(tmp_path, CONFIG, tensors, 20_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    for file in files:
        sizes = [tensors[name].nbytes for name, found in index["weight_map"].items() if found == file]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert not (tmp_path / SINGLE_FILE).exists()


def test_a_new_model_replaces_an_old_one_and_leaves_the_tokenizer(tmp_path: Path) -> None:
    old, new = random_tensors(CONFIG, 1), random_tensors(CONFIG, 2)
    for old_bytes, new_bytes in ((20_000, 2**30), (2**30, 20_000), (20_000, 40_000)):
        written(tmp_path, CONFIG, old, old_bytes)
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / ".writing-stray").write_text("left by a killed run")
        written(tmp_path, CONFIG, new, new_bytes)
        checkpoint = Checkpoint.open(tmp_path)
        checkpoint.validate()
        assert all(torch.equal(checkpoint.tensor(name), new[name]) for name in new)
        names = {path.name for path in tmp_path.iterdir()}
        expected = {path for path in names if path.startswith("model-")}
        assert "tokenizer.json" in names
        assert names <= {"tokenizer.json", CONFIG_FILE, SINGLE_FILE, INDEX_FILE, *expected}
        assert (SINGLE_FILE in names) is not (INDEX_FILE in names)


def test_mixed_dtypes_and_odd_layouts_are_written_aligned(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.int8),
        "wide": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
        "half": torch.arange(5.0).bfloat16(),
        "every second": torch.arange(8.0)[::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    write_checkpoint(tmp_path, CONFIG.to_hf(), tensors.items())
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.tensor(name)
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
        assert found.data_ptr() % found.dtype.itemsize == 0


def failing(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:20]
    raise RuntimeError("the source broke")


def test_a_failure_leaves_the_old_model_and_no_strays(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, 1)
    before = contents(written(tmp_path, CONFIG, tensors, 20_000))
    twice = [*tensors.items(), ("model.norm.weight", torch.ones(48))]
    complex_one = [("a", torch.ones(3)), ("b", torch.ones(3, dtype=torch.complex64))]
    for source, error in (
        (failing(tensors), RuntimeError),
        (iter(twice), CheckpointError),
        (iter(complex_one), CheckpointError),
        (iter([]), CheckpointError),
    ):
        with pytest.raises(error):
            write_checkpoint(tmp_path, CONFIG.to_hf(), source, 20_000)
        assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(tmp_path, {"rope_theta": float("nan")}, tensors.items(), 20_000)
    assert contents(tmp_path) == before


def test_a_full_or_closed_folder_is_one_error_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the model"):
        write_checkpoint(tmp_path / "file", CONFIG.to_hf(), random_tensors(CONFIG, 1).items())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path / "new", CONFIG.to_hf(), random_tensors(CONFIG, 1).items())
    assert not list((tmp_path / "new").iterdir())


def test_files_are_synced_before_they_are_named_and_the_config_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        events.append((path.name, Path(target).name))
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    folder = written(tmp_path / "model", CONFIG, random_tensors(CONFIG, 1), 20_000)
    renames = [place for place, (first, _) in enumerate(events) if first != "sync"]
    assert len(renames) == len(list(folder.iterdir()))
    for place in renames:
        assert ("sync", events[place][0]) in events[:place]
    assert events[renames[-1]][1] == CONFIG_FILE
    assert ("sync", "model") in events[renames[-2] : renames[-1]]
    assert ("sync", "model") in events[renames[-1] :]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from checkpoint_cases import random_tensors, small_config, written
config = small_config()
tensors = random_tensors(config, 2)
count = 0
def deadly(real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync, Path.replace, Path.unlink = deadly(os.fsync), deadly(Path.replace), deadly(Path.unlink)
for point in range(1, 200):
    child = os.fork()
    if child == 0:
        written(Path(sys.argv[1]) / str(point), config, tensors, 80_000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
print(point)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("has_old_model", [False, True])
def test_a_kill_at_any_point_leaves_the_old_model_the_new_one_or_none(tmp_path: Path, has_old_model: bool) -> None:
    old, new = random_tensors(CONFIG, 1), random_tensors(CONFIG, 2)
    if has_old_model:
        for point in range(1, 40):
            written(tmp_path / str(point), CONFIG, old, 80_000)
    here = Path(__file__).parents
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "", str(here[1]), str(here[2])],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    num_points = int(done.stdout)
    assert 10 < num_points < 40
    outcomes = []
    for point in range(1, num_points + 1):
        folder = tmp_path / str(point)
        if not (folder / CONFIG_FILE).exists():
            outcomes.append("none")
            continue
        checkpoint = Checkpoint.open(folder)
        checkpoint.validate()
        found = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names}
        is_old = all(torch.equal(found[name], old[name]) for name in old)
        is_new = all(torch.equal(found[name], new[name]) for name in new)
        assert is_old or is_new
        outcomes.append("old" if is_old else "new")
        written(folder, CONFIG, new, 80_000)  # the next good run clears the strays
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert outcomes[0] == ("old" if has_old_model else "none") and outcomes[-1] == "new"
    order = ["old", "none", "new"]
    assert [order.index(outcome) for outcome in outcomes] == sorted(order.index(outcome) for outcome in outcomes)
