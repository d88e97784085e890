"""A name leads to the package's own model, a folder the user typed, or a cached hub snapshot; to nothing else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salalocal.checkpoint import hub
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model, is_builtin, is_hub_id
from salalocal.errors import HubError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that holds one snapshot, acme/tiny-model."""
    from huggingface_hub import constants

    root = tmp_path / "hf"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    repository = root / "models--acme--tiny-model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_cached_model_is_found(cache: Path) -> None:
    assert find_model("acme/tiny-model") == ModelFolder(cache)
    assert find_model("acme/tiny-model", offline=True) == ModelFolder(cache)


def test_a_model_that_is_not_here_is_an_error_with_the_command(cache: Path) -> None:
    with pytest.raises(HubError, match="'acme/other': not in the local Hugging Face cache") as caught:
        find_model("acme/other")
    assert caught.value.hint.endswith("salalocal pull acme/other") and caught.value.exit_code == 5
    with pytest.raises(HubError) as caught:
        find_model("acme/other", offline=True)
    assert "when online" in caught.value.hint and "salalocal pull acme/other" in caught.value.hint


def test_a_snapshot_without_a_config_counts_as_not_here(cache: Path) -> None:
    (cache / "config.json").unlink()
    with pytest.raises(HubError, match="not in the local"):
        find_model("acme/tiny-model")


def test_a_folder_is_taken_as_it_is_and_wins_over_a_hub_id(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "acme" / "tiny-model").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "acme" / "tiny-model"):
        (folder / "config.json").write_text("{}")
    assert find_model(tmp_path) == ModelFolder(tmp_path)
    assert find_model(str(tmp_path)) == ModelFolder(tmp_path)
    assert find_model("acme/tiny-model") == ModelFolder(Path("acme/tiny-model"))


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"no model folder, config\.json is missing"):
        find_model(tmp_path)


def test_builtin_is_the_folder_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = Path(hub.__file__).parents[1]
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    if (package / "builtin" / "config.json").exists():
        assert find_model("builtin") == ModelFolder(package / "builtin")
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "salalocal" / "checkpoint" / "hub.py"))
    with pytest.raises(HubError, match="no embedded model"):
        find_model("builtin")


def test_a_variant_is_named_behind_a_colon(cache: Path, tmp_path: Path) -> None:
    (cache / "config.int4.json").write_text("{}")
    assert find_model("acme/tiny-model:int4") == ModelFolder(cache, "int4")
    assert find_model(f"{cache}:int4") == ModelFolder(cache, "int4")
    (tmp_path / "odd:int4").mkdir()
    (tmp_path / "odd:int4" / "config.json").write_text("{}")
    for name in ("odd:int4", tmp_path / "odd:int4"):
        assert find_model(name) == ModelFolder(Path(name))


def test_a_variant_that_is_not_there_is_an_error_with_those_that_are(cache: Path) -> None:
    for variant in ("int4", "bf16", "..", "a.b"):
        (cache / f"config.{variant}.json").write_text("{}")
    with pytest.raises(HubError, match=r"model 'acme/tiny-model:fp8': there is no variant fp8") as caught:
        find_model("acme/tiny-model:fp8")
    assert caught.value.hint == "choose from acme/tiny-model, acme/tiny-model:bf16, acme/tiny-model:int4"


def test_the_built_in_model_is_known_by_its_name_in_every_variant() -> None:
    assert is_builtin("builtin") and is_builtin("builtin:bf16")
    assert not is_builtin("./builtin") and not is_builtin("builtin2")


@pytest.mark.parametrize(
    "name",
    [
        "a:b", "a/b:../c", "builtin:", ":bf16", "builtin:../x", "builtin:a/b", "builtin:" + "x" * 33, "builtin:a.b",
        "", ".", "..", "/", "a", "a/b/c", "../b", "a/..", "a/../b", "/a/b", "a\\b", "a/b\0", "a/b\n", "C:/x",
        "//srv/share", "a/b..c", "a--b/c", "a/.b", "-a/b", "a/b-", "a/b.", "é/b", "a/" + "b" * 97, "~nobody-at-all/x",
        "a /b", "a/b?x=1", "a/%2e%2e", "hf://a/b", "x" * 5000,
    ],
)  # fmt: skip
def test_hostile_names_reach_neither_a_path_nor_the_hub(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_hub_id(name)
    monkeypatch.setattr(hub, "_cached_folder", lambda *_: pytest.fail("asked the cache"))
    if name in (".", "..", "/", "a/.."):  # folders that exist are folders
        return
    with pytest.raises(HubError, match="not a hub id") as caught:
        find_model(name)
    assert "\n" not in caught.value.message and len(caught.value.message) <= 300


@given(st.text(max_size=30))
def test_a_hub_id_builds_one_plain_cache_folder(name: str) -> None:
    if is_hub_id(name):
        organisation, model = name.split("/")
        assert all(c.isascii() and (c.isalnum() or c in "._-") for c in organisation + model)
        assert Path("models--" + name.replace("/", "--")).name == "models--" + name.replace("/", "--")
