"""Damaged archives never pass as whole: cuts and flips at random places of small archives of every kind."""

import random
from pathlib import Path

import archives
import pytest

from salalocal.errors import PackError
from salalocal.prompt.sources import PackLimits, Reading, read_sources

NUM_EACH = 60


def small_files(rng: random.Random) -> list[tuple[str, bytes]]:
    words = ["alpha", "beta", "gamma", "delta", "naïve", "x = 1", "\n", "# " + "long " * 20]
    return [
        (f"pkg-1.0/{folder}file{i}.txt", " ".join(rng.choices(words, k=rng.randrange(5, 400))).encode())
        for i, folder in enumerate(["", "src/", "src/deep/", "a" * 90 + "/" + "b" * 60 + "/", "docs/", ""])
    ]


def build(kind: str, files: list[tuple[str, bytes]]) -> bytes:
    if kind == "zip":
        return archives.zip_of(files)
    if kind == "stored.zip":
        return archives.zip_of(files, method=0)
    return archives.PACKERS[kind](archives.tar_of(files))


def texts(reading: Reading) -> list[tuple[str, str]]:
    return [(document.path, document.text) for document in reading.documents]


def outcome(path: Path, limits: PackLimits | None = None) -> Reading | None:
    try:
        return read_sources([path], limits)
    except PackError:
        return None


NAMES = {kind: f"x.tar{kind}" for kind in archives.PACKERS}
NAMES |= {"zip": "x.zip", "stored.zip": "x.zip"}
KINDS = list(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_archive_never_passes_as_whole(kind: str, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = small_files(rng)
    data = build(kind, files)
    whole = read_sources([archives.written(tmp_path / "whole.tar", data)])
    assert len(whole.documents) == len(files)
    useful = len(data.rstrip(b"\0")) if kind == "" else len(data)
    for cut in {*rng.choices(range(1, len(data)), k=NUM_EACH), len(data) - 1}:
        found = outcome(archives.written(tmp_path / NAMES[kind], data[:cut]))
        # A plain tar is padded with zeros: without some of them it is still whole.
        assert found is None or (texts(found) == texts(whole) and cut >= useful), f"cut at {cut} of {len(data)}"
        if found is not None and cut < useful + 2 * archives.BLOCK:
            assert any("zeros" in note for note in found.notes) or cut % archives.BLOCK == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_never_silent(kind: str, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = small_files(rng)
    data = build(kind, files)
    whole = read_sources([archives.written(tmp_path / "whole.tar", data)])
    places = list(range(len(data)))
    if kind == "":  # a plain tar holds no checksum of what it contains, nor of the long names in pax records
        contents = [content for _, content in files]
        held = {i for content in contents for i in range(data.index(content), data.index(content) + len(content))}
        places = [i for i in places if i not in held]
    for place in rng.choices(places, k=NUM_EACH):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        found = outcome(archives.written(tmp_path / NAMES[kind], bytes(flipped)))
        is_told = found is not None and (found.skips != whole.skips or found.notes != whole.notes)
        assert found is None or is_told or texts(found) == texts(whole), f"flipped a bit of byte {place} of {len(data)}"


@pytest.mark.parametrize("kind", KINDS)
def test_partial_keeps_only_whole_members_and_notes_the_gap(kind: str, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    files = small_files(rng)
    data = build(kind, files)
    expected = set(texts(read_sources([archives.written(tmp_path / "whole.tar", data)])))
    end = len(data.rstrip(b"\0")) if kind == "" else len(data)
    for cut in rng.choices(range(1, end), k=20):
        found = outcome(archives.written(tmp_path / NAMES[kind], data[:cut]), PackLimits(partial=True))
        if found is not None:
            ends = tuple(path for path, _ in expected)
            assert all(any(end.endswith(path) or path.endswith(end) for end in ends) for path, _ in texts(found))
            assert {text for _, text in texts(found)} <= {text for _, text in expected}
            assert any("gap" in note and "damaged at member" in note for note in found.notes)


def test_partial_reads_on_behind_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    files = [(f"f{i}.txt", f"text number {i}\n".encode() * 50) for i in range(5)]
    data = bytearray(archives.zip_of(files, method=0))
    data[data.index(b"text number 2") + 3] ^= 4
    path = archives.written(tmp_path / "x.zip", bytes(data))
    with pytest.raises(PackError, match=r"damaged at member 3 of 5; 2 whole members before it"):
        read_sources([path])
    found = read_sources([path], PackLimits(partial=True))
    assert [document.path for document in found.documents] == ["f0.txt", "f1.txt", "f3.txt", "f4.txt"]
    assert found.skips[0].path == "f2.txt"
    assert any("gap" in note for note in found.notes)


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
def test_what_follows_a_compressed_stream_is_damage_but_padding_is_not(kind: str, tmp_path: Path) -> None:
    data = archives.PACKERS[kind](archives.tar_of([("a.txt", b"text\n")]))
    assert read_sources([archives.written(tmp_path / "padded", data + bytes(512))]).documents
    with pytest.raises(PackError, match="damaged"):
        read_sources([archives.written(tmp_path / "followed", data + b"rubbish")])


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
def test_streams_in_a_row_are_one(kind: str, tmp_path: Path) -> None:
    tar = archives.tar_of([("a.txt", b"text\n" * 500)])
    data = b"".join(archives.PACKERS[kind](tar[at : at + 1000]) for at in range(0, len(tar), 1000))
    assert read_sources([archives.written(tmp_path / "x", data)]).documents[0].text == "text\n" * 500


def test_a_gzip_checksum_is_checked_behind_the_last_member(tmp_path: Path) -> None:
    long_text = random.Random(1).randbytes(200_000).hex().encode()
    data = bytearray(archives.PACKERS[".gz"](archives.tar_of([("a.txt", long_text)])))
    data[-6] ^= 1
    with pytest.raises(PackError, match=r"damaged at member .*incorrect data check"):
        read_sources([archives.written(tmp_path / "x.tar.gz", bytes(data))])
