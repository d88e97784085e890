"""The files of a folder and of the variants in it; the bytes of its tensors, counted from headers."""

from pathlib import Path

import pytest
from checkpoint_cases import random_tensors, small_config, written

from salalocal.checkpoint.folder import ModelFolder, is_variant_name, read_headers, stored_bytes
from salalocal.errors import CheckpointError


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_bytes_are_those_of_all_tensors(tmp_path: Path, seed: int, max_shard_bytes: int) -> None:
    tensors = random_tensors(small_config(), seed)
    written(tmp_path, small_config(), tensors, max_shard_bytes)
    assert stored_bytes(tmp_path) == sum(tensor.nbytes for tensor in tensors.values())
    assert (len(read_headers(tmp_path)) > 1) == (max_shard_bytes == 20_000)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        stored_bytes(tmp_path)


def test_a_variant_has_files_of_its_own_names(tmp_path: Path) -> None:
    plain, variant = ModelFolder(tmp_path), ModelFolder(tmp_path, "bf16")
    assert plain.file("config.json") == tmp_path / "config.json" and str(plain) == str(tmp_path)
    assert variant.file("config.json") == tmp_path / "config.bf16.json" and str(variant) == f"{tmp_path}:bf16"
    assert variant.file("model.safetensors") == tmp_path / "model.bf16.safetensors"
    assert variant.file("model.safetensors.index.json") == tmp_path / "model.safetensors.index.bf16.json"
    assert ModelFolder.of(variant) is variant and ModelFolder.of(str(tmp_path)) == plain
    for name in (
        "config.json",
        "config.bf16.json",
        "config.int4.json",
        "config.a.b.json",
        "config..json",
        "xconfig.a.json",
    ):
        (tmp_path / name).write_text("{}")
    assert plain.variants == variant.variants == ("bf16", "int4")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "-a", "a b", "a\n", "é", "a" * 33])
def test_a_variant_name_is_no_path(name: str) -> None:
    assert not is_variant_name(name)


def test_a_variant_without_weights_is_refused_by_its_names(tmp_path: Path) -> None:
    written(tmp_path, small_config(), random_tensors(small_config(), 1))
    with pytest.raises(CheckpointError, match="no weights here") as caught:
        stored_bytes(ModelFolder(tmp_path, "bf16"))
    assert "model.bf16.safetensors" in caught.value.hint
