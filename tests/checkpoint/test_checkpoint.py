"""A model folder is opened, checked and read; whatever is wrong with it is one CheckpointError that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import random_tensors, small_config, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from salalocal.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder of several shards."""
    return written(tmp_path / "model", small_config(), random_tensors(small_config(), 1), max_shard_bytes=20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_written_is_read(
    tmp_path: Path, seed: int, dtype: torch.dtype, max_shard_bytes: int, tied: bool
) -> None:
    config = small_config(tied, dtype)
    tensors = random_tensors(config, seed, dtype)
    checkpoint = Checkpoint.open(written(tmp_path, config, tensors, max_shard_bytes))
    checkpoint.validate()
    assert checkpoint.config == config
    assert sorted(checkpoint.tensor_names) == sorted(tensors)
    assert checkpoint.weights_dtype == dtype
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape) and checkpoint.dtype(name) == dtype
        assert torch.equal(checkpoint.tensor(name), tensor), name


def test_a_folder_saved_by_the_library_is_read(tmp_path: Path, seed: int) -> None:
    config, tensors = small_config(), random_tensors(small_config(), seed)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config.to_hf()))
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(str(tmp_path))
    checkpoint.validate()
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


def test_links_to_a_blob_store_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    checkpoint = Checkpoint.open(snapshot)
    checkpoint.validate()
    assert checkpoint.tensor("model.norm.weight").shape == (48,)


def test_variants_share_files_and_have_their_own_config(tmp_path: Path, seed: int) -> None:
    config, tensors = small_config(), random_tensors(small_config(), seed)
    shared = {name for name, tensor in tensors.items() if tensor.ndim == 1}
    parts = {
        "model-shared.safetensors": {name: tensors[name] for name in shared},
        "model-one.safetensors": {name: tensor for name, tensor in tensors.items() if name not in shared},
        "model-two.safetensors": {name: -tensor for name, tensor in tensors.items() if name not in shared},
    }
    for file, held in parts.items():
        save_file(held, tmp_path / file)
    for place, file, vocab_size in (
        (ModelFolder(tmp_path), "model-one", 96),
        (ModelFolder(tmp_path, "two"), "model-two", 95),
    ):
        weight_map = {name: "model-shared.safetensors" if name in shared else f"{file}.safetensors" for name in tensors}
        place.file(INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        place.file(CONFIG_FILE).write_text(json.dumps({**config.to_hf(), "vocab_size": vocab_size}))
    one, two = Checkpoint.open(tmp_path), Checkpoint.open(ModelFolder(tmp_path, "two"))
    assert (one.config.vocab_size, two.config.vocab_size) == (96, 95)
    assert one.fingerprint != two.fingerprint and one.num_bytes == two.num_bytes
    for name, tensor in tensors.items():
        assert torch.equal(one.tensor(name), tensor)
        assert torch.equal(two.tensor(name), tensor if name in shared else -tensor)
    with pytest.raises(CheckpointError, match=":two: tensors do not fit"):
        two.validate()


def test_unknown_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    config, tensors = small_config(), random_tensors(small_config(), 1)
    del tensors["model.layers.2.self_attn.o_norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(48, 80)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    checkpoint = Checkpoint.open(written(tmp_path, config, tensors))
    problems = checkpoint.problems()
    assert problems.missing == ("model.layers.2.self_attn.o_norm.weight", "lm_head.weight")
    assert problems.unknown == ("model.layers.0.self_attn.q_norm.weight",)
    assert sorted(problems.misshapen) == [
        "model.layers.0.mlp.gate_proj.weight [48, 80], not [80, 48]",
        "model.norm.weight I32, not BF16/F16/F32",
    ]
    with pytest.raises(CheckpointError) as caught:
        checkpoint.validate()
    for part in ("2 missing: model.", "1 unknown: model.", "2 misshapen: model.", "and 1 more"):
        assert part in caught.value.message
    assert len(caught.value.message) <= 300


def test_many_missing_tensors_are_named_by_the_first_few_and_a_count(tmp_path: Path) -> None:
    config = small_config()
    checkpoint = Checkpoint.open(written(tmp_path, config, {"model.norm.weight": torch.ones(48)}))
    with pytest.raises(CheckpointError, match=r"48 missing: model.embed_tokens.weight, .* and \d+ more") as caught:
        checkpoint.validate()
    assert len(caught.value.message) <= 300


def test_a_tied_model_ignores_a_stored_head_of_the_right_shape_only(tmp_path: Path) -> None:
    config = small_config(tie_word_embeddings=True)
    tensors = random_tensors(config, 1)
    Checkpoint.open(written(tmp_path, config, tensors | {"lm_head.weight": torch.zeros(96, 48)})).validate()
    with pytest.raises(CheckpointError, match=r"misshapen: lm_head.weight \[96, 47\], not \[96, 48\]"):
        Checkpoint.open(written(tmp_path, config, tensors | {"lm_head.weight": torch.zeros(96, 47)})).validate()


def test_a_quantized_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    config = {**small_config().to_hf(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    written(tmp_path, small_config(), random_tensors(small_config(), 1))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantized \(gptq\)"):
        Checkpoint.open(tmp_path).validate()


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def set_shard(name: object) -> Callable[[Path], object]:
    return lambda folder: edit_index(folder, lambda i: i["weight_map"].update({"model.norm.weight": name}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*"))


HOSTILE = [
    "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "..",
    "x\0.safetensors", ".x.safetensors", "x.bin", "x.safetensors ", "x\u2044y.safetensors", "",
    "n" * 300 + ".safetensors", 7, None, ["x.safetensors"],
]  # fmt: skip
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "config.json: cannot be read: No such file"),
    "config a folder": (lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).mkdir()), "not a regular file"),
    "config a pipe": (lambda f: ((f / CONFIG_FILE).unlink(), os.mkfifo(f / CONFIG_FILE)), "not a regular file"),
    "config too large": (lambda f: os.truncate(f / CONFIG_FILE, 5_000_000), "the limit is"),
    "config of zeros": (lambda f: os.truncate(f / CONFIG_FILE, 0), "bad JSON"),
    "config lacks a field": (lambda f: (f / CONFIG_FILE).write_text("{}"), "config"),
    "index doubled key": (
        lambda f: (f / INDEX_FILE).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'),
        "'a' stands twice",
    ),
    "index without a map": (lambda f: (f / INDEX_FILE).write_text('{"metadata": {}}'), "weight_map"),
    "index with an empty map": (lambda f: (f / INDEX_FILE).write_text('{"weight_map": {}}'), "weight_map"),
    "index of the wrong kind": (lambda f: (f / INDEX_FILE).write_text('{"weight_map": ["a"]}'), "weight_map"),
    "index and nothing else": (lambda f: [path.unlink() for path in shards(f)], "No such file"),
    "no weights": (lambda f: [path.unlink() for path in [*shards(f), f / INDEX_FILE]], "no weights here"),
    "pickled weights": (
        lambda f: ([p.unlink() for p in [*shards(f), f / INDEX_FILE]], (f / "pytorch_model.bin").touch()),
        r"only pickled weights \(pytorch_model.bin\)",
    ),
    "one shard missing": (lambda f: shards(f)[1].unlink(), "No such file"),
    "one shard truncated": (lambda f: os.truncate(shards(f)[0], shards(f)[0].stat().st_size - 1), "truncated"),
    "shard a folder": (lambda f: (shards(f)[0].unlink(), shards(f)[0].mkdir()), "No such file|not a regular|cannot"),
    "listed elsewhere": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"model.norm.weight": shards(f)[0].name})),
        "'model.norm.weight' is listed but not stored in model-00001",
    ),
    "listed, not stored": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"new": shards(f)[0].name})),
        "'new' is listed but not stored",
    ),
    "stored, not listed": (
        lambda f: edit_index(f, lambda i: i["weight_map"].pop("model.norm.weight")),
        "'model.norm.weight' is stored but not listed",
    ),
    "case twins": (
        lambda f: edit_index(
            f, lambda i: i["weight_map"].update({"new": shards(f)[0].name.upper()[:-11] + "safetensors"})
        ),
        "upper and lower case",
    ),
    "too many shards": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({f"t{n}": f"x{n}.safetensors" for n in range(5000)})),
        "the limit is 4,096",
    ),
    **{f"shard name {number}": (set_shard(name), "not a plain name") for number, name in enumerate(HOSTILE)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_with_file_and_reason(folder: Path, fault: str) -> None:
    damage, reason = FAULTS[fault]
    if fault == "shard a folder":
        path = shards(folder)[0]
        path.unlink()
        path.mkdir()
    else:
        damage(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Checkpoint.open(folder).validate()
    assert "\n" not in caught.value.message
    assert str(folder) in caught.value.message or "..." in caught.value.message


def test_the_config_error_names_the_folder(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["num_key_value_heads"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model: config: .*num_key_value_heads"):
        Checkpoint.open(folder)


def test_the_fingerprint_names_config_table_and_contents(tmp_path: Path) -> None:
    config, tensors = small_config(), random_tensors(small_config(), 1)

    def fingerprint(name: str, changed: dict[str, torch.Tensor], **fields: object) -> str:
        folder = written(tmp_path / name, config, tensors | changed)
        raw = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(raw | fields))
        return Checkpoint.open(folder).fingerprint

    plain = fingerprint("a", {})
    assert plain == fingerprint("b", {})  # another place
    assert plain == Checkpoint.open(tmp_path / "a").fingerprint
    others = [
        fingerprint("c", {}, rope_theta=10001.0),
        fingerprint("d", {"model.norm.weight": tensors["model.norm.weight"] + 1}),
        fingerprint("e", {"model.norm.weight": tensors["model.norm.weight"].half()}),
    ]
    assert len({plain, *others}) == 4


def test_weights_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    config = small_config(dtype=torch.bfloat16)
    tensors = random_tensors(config, 1, torch.bfloat16)
    tensors = {name: t.float() if t.ndim == 1 else t for name, t in tensors.items()}
    checkpoint = Checkpoint.open(written(tmp_path, config, tensors))
    checkpoint.validate()
    assert checkpoint.weights_dtype == torch.bfloat16
    assert checkpoint.dtype("model.norm.weight") == torch.float32


def test_the_library_reads_our_shards(folder: Path) -> None:
    expected = random_tensors(small_config(), 1)
    found: dict[str, torch.Tensor] = {}
    for path in shards(folder):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 64, 65_537, 2**31, 2**63, 2**200]) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["minicpm4", "attn", "float32", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
CONFIG_DICT = small_config().to_hf()
FIELDS = [*CONFIG_DICT, "quantization_config", "torch_dtype", "pad_token_id", "anything"]
SPARSE_FIELDS = [*CONFIG_DICT["sparse_config"], "anything"]
QUIET = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens_or_is_refused(folder: Path) -> None:
    try:
        Checkpoint.open(folder).validate()
    except CheckpointError as error:
        assert error.message.isprintable()


@QUIET
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(SPARSE_FIELDS), VALUES, max_size=2),
)
def test_any_config_opens_or_is_refused(folder: Path, changed: dict[str, Any], sparse: dict[str, Any]) -> None:
    config = {**CONFIG_DICT, "sparse_config": {**CONFIG_DICT["sparse_config"], **sparse}, **changed}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    opens_or_is_refused(folder)


@QUIET
@given(st.sampled_from([CONFIG_FILE, INDEX_FILE]), st.integers(0, 4000), st.binary(max_size=6), st.integers(0, 40))
def test_a_file_with_foreign_bytes_opens_or_is_refused(
    folder: Path, name: str, place: int, put: bytes, skip: int
) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:place] + put + whole[place + skip :])
    opens_or_is_refused(folder)
    (folder / name).write_bytes(whole)


@QUIET
@given(
    st.dictionaries(
        st.sampled_from(["model.norm.weight", "new", ""]),
        VALUES | st.sampled_from(["a", "model-00001-of-00004.safetensors"]),
    )
)
def test_any_index_opens_or_is_refused(folder: Path, changed: dict[str, Any]) -> None:
    whole = (folder / INDEX_FILE).read_bytes()
    edit_index(folder, lambda index: index["weight_map"].update(changed))
    opens_or_is_refused(folder)
    (folder / INDEX_FILE).write_bytes(whole)
