"""Packs: order, digest, manifest, add and drop; and that none of them changes a pack that exists."""

import hashlib
import random
from dataclasses import FrozenInstanceError, replace

import pytest

from salalocal.errors import PackError, RequestError
from salalocal.prompt.pack import ManifestEntry, PromptPack
from salalocal.prompt.sources import Document, Reading


def document(path: str, text: str = "text\n", mtime: float = 0.0, num_changes: int = 0) -> Document:
    data = text.encode()
    return Document(path, text, hashlib.sha256(data).hexdigest(), len(data), (), mtime, num_changes)


def pack_of(*paths: str, order: str = "auto") -> PromptPack:
    return PromptPack.build(Reading(tuple(map(document, paths))), order)


def paths(pack: PromptPack) -> list[str]:
    return [found.path for found in pack]


def test_readme_and_manifests_come_first(seed: int) -> None:
    expected = [
        "README.md",
        "pyproject.toml",
        "setup.py",
        "Cargo.toml",
        "a.py",
        "docs/README.md",
        "src/package.json",
        "z.py",
    ]
    shuffled = expected[:]
    random.Random(seed).shuffle(shuffled)
    assert paths(pack_of(*shuffled)) == expected


def test_the_top_is_one_folder_down_when_names_begin_with_their_source() -> None:
    given = ["one/a.py", "two/a.py", "two/README.md", "one/README.md", "one/docs/readme.txt"]
    assert paths(pack_of(*given)) == ["one/README.md", "two/README.md", "one/a.py", "one/docs/readme.txt", "two/a.py"]


def test_orders() -> None:
    reading = Reading(
        (
            document("hot.py", mtime=5, num_changes=9),
            document("b.py", mtime=9, num_changes=1),
            document("README.md", mtime=7, num_changes=20),
            document("a.py", mtime=1, num_changes=1),
        )
    )
    expected = {
        "auto": ["README.md", "a.py", "b.py", "hot.py"],
        "git": ["a.py", "b.py", "hot.py", "README.md"],
        "path": ["README.md", "a.py", "b.py", "hot.py"],
        "mtime": ["a.py", "hot.py", "README.md", "b.py"],
        "given": ["hot.py", "b.py", "README.md", "a.py"],
    }
    for order, wanted in expected.items():
        assert paths(PromptPack.build(reading, order)) == wanted, order
    with pytest.raises(RequestError, match="no order is called"):
        PromptPack.build(reading, "size")


def test_digest_is_of_paths_texts_and_order() -> None:
    one, two = document("a", "x\n"), document("b", "y\n")
    pack = PromptPack((one, two))
    assert pack == PromptPack((one, replace(two, mtime=3.0, notes=("seen",))))
    assert hash(pack) == hash(PromptPack((one, two)))
    others = [
        (two, one),
        (one,),
        (one, replace(two, text="z\n")),
        (one, replace(two, path="c")),
        (document("ab", "x\ny\n"),),
    ]
    assert len({PromptPack(other).digest for other in others} | {pack.digest}) == 6
    assert len({PromptPack((document("a", "bc"),)).digest, PromptPack((document("ab", "c"),)).digest}) == 2


def test_manifest() -> None:
    pack = PromptPack((document("a", "x\n"),))
    assert pack.manifest == (ManifestEntry("a", hashlib.sha256(b"x\n").hexdigest(), 2),)
    assert pack.num_bytes == 2
    assert len(pack) == 1


def test_add_appends_numbers_twins_and_leaves_out_what_is_known() -> None:
    pack = pack_of("a.py", "b.py")
    added = pack.add([document("a.py"), document("B.py", "new\n"), document("c.py")])
    assert paths(added) == ["a.py", "b.py", "B.py (2)", "c.py"]
    assert paths(pack) == ["a.py", "b.py"]
    assert added.documents[:2] == pack.documents


def test_drop_takes_a_path_or_an_end_that_fits_one() -> None:
    pack = pack_of("a/x.py", "b/x.py", "b/y.py", "x.py")
    assert paths(pack.drop("x.py")) == ["a/x.py", "b/x.py", "b/y.py"]
    assert paths(pack.drop("./b/x.py")) == ["a/x.py", "b/y.py", "x.py"]
    assert paths(pack.drop("y.py")) == ["a/x.py", "b/x.py", "x.py"]
    assert len(pack) == 4
    rest = pack.drop("x.py")
    with pytest.raises(PackError, match=r'fits 2 documents: "a/x.py", "b/x.py"'):
        rest.drop("x.py")
    with pytest.raises(PackError, match="no document is called") as caught:
        rest.drop("z.py")
    assert "did you mean" in caught.value.hint
    with pytest.raises(PackError):
        rest.drop(".py")


def test_packs_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        pack_of("a").documents = ()  # type: ignore[misc]
