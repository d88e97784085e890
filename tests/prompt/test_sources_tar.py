"""Tars of every dialect: long names, sizes, sparse files in all four forms, and how an archive may end."""

import shutil
import subprocess
from pathlib import Path

import archives
import pytest
from archives import BLOCK, END, padded, paths, pax_member, read, reasons, sparse_header, tar, tar_header, tar_member

from salalocal.errors import PackError

TEXT = b"line of text\n" * 100
GOOD_MEMBER = tar_member(b"good.txt", b"good text\n")


def text_of(data: bytes, tmp_path: Path) -> str:
    reading = read(tmp_path, "x.tar", data)
    return "".join(document.text for document in reading.documents if document.path != "good.txt")


def test_names_and_sizes_of_every_dialect(tmp_path: Path) -> None:
    long_name = b"folder/" * 30 + b"file.txt"
    base256 = b"\x80" + len(TEXT).to_bytes(11, "big")
    v7 = {257: bytes(8)}
    signed = bytearray(tar_header(b"n\xe9\xe8.txt", len(TEXT)))
    signed[148:156] = b"%06o\0 " % (int(signed[148:154], 8) - 512)
    members = {
        "gnu long name": tar_member(b"././@LongLink", long_name + b"\0", b"L") + tar_header(long_name[:99], len(TEXT)),
        "pax long name": pax_member({"path": long_name, "comment": b"a=b\nc"}, b"short", b"")[:-BLOCK]
        + tar_header(b"short", len(TEXT)),
        "pax size": pax_member({"size": b"%d" % len(TEXT)}, b"x", b"")[:-BLOCK] + tar_header(b"x", 0),
        "base 256": tar_header(b"x", base256),
        "old v7": tar_header(b"x", len(TEXT), b"\0", changes=v7),
        "signed checksum": bytes(signed),
        "prefix": tar_header(b"x", len(TEXT), changes={345: b"some/folder"}),
        "spaces around numbers": tar_header(b"x", b"%10o \0" % len(TEXT)),
        "global header": tar_member(b"pax_global_header", b"52 comment=" + b"c" * 40 + b"\n", b"g")
        + tar_header(b"x", len(TEXT)),
    }
    for kind, header in members.items():
        data = tar(header + padded(TEXT), GOOD_MEMBER)
        assert text_of(data, tmp_path) == TEXT.decode(), kind
    long_names = [
        paths(read(tmp_path, "x.tar", tar(members[kind] + padded(TEXT), GOOD_MEMBER)))[0] for kind in list(members)[:2]
    ]
    assert long_names == [long_name.decode()] * 2


SPARSE_TEXT = TEXT * 10 + bytes(5) + b"the end\n"
RUNS = [(0, len(TEXT) * 10), (len(TEXT) * 10 + 5, 8), (len(SPARSE_TEXT), 0)]
STORED = TEXT * 10 + b"the end\n"


def old_sparse() -> bytes:
    return sparse_header(b"s.txt", len(SPARSE_TEXT), RUNS) + padded(STORED)


def long_old_sparse() -> bytes:
    runs = [(at, 1) for at in range(20)] + [(20, RUNS[0][1] - 20), *RUNS[1:]]
    header = sparse_header(b"s.txt", len(SPARSE_TEXT), runs)
    block = b"".join(b"%011o\0%011o\0" % run for run in runs[4:])
    return header + block.ljust(BLOCK, b"\0") + padded(STORED)


def pax_sparse_0_0() -> bytes:
    records = [(b"GNU.sparse.size", b"%d" % len(SPARSE_TEXT))]
    for at, size in RUNS:
        records += [(b"GNU.sparse.offset", b"%d" % at), (b"GNU.sparse.numbytes", b"%d" % size)]
    lines = b"".join(b"%d %s=%s\n" % (len(key) + len(value) + 5, key, value) for key, value in records)
    return tar_member(b"pax", lines, b"x") + tar_member(b"s.txt", STORED)


def pax_sparse_0_1() -> bytes:
    numbers = b",".join(b"%d,%d" % run for run in RUNS)
    return pax_member(
        {"GNU.sparse.size": b"%d" % len(SPARSE_TEXT), "GNU.sparse.map": numbers, "GNU.sparse.name": b"s.txt"},
        b"t",
        STORED,
    )


def pax_sparse_1_0() -> bytes:
    numbers = b"%d\n" % len(RUNS) + b"".join(b"%d\n%d\n" % run for run in RUNS)
    records = {
        "GNU.sparse.major": b"1",
        "GNU.sparse.minor": b"0",
        "GNU.sparse.name": b"s.txt",
        "GNU.sparse.realsize": b"%d" % len(SPARSE_TEXT),
    }
    return pax_member(records, b"GNUSparseFile.0/s.txt", padded(numbers) + STORED)


@pytest.mark.parametrize("make", [old_sparse, long_old_sparse, pax_sparse_0_0, pax_sparse_0_1, pax_sparse_1_0])
def test_sparse_text_is_filled(make: object, tmp_path: Path) -> None:
    reading = read(tmp_path, "x.tar", tar(make(), GOOD_MEMBER))  # type: ignore[operator]
    assert paths(reading) == ["s.txt", "good.txt"]
    assert reading.documents[0].text == SPARSE_TEXT.decode().replace("\0", "\u2400")
    assert reading.documents[0].num_bytes == len(SPARSE_TEXT)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize(
    "form", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_what_gnu_tar_makes_of_a_sparse_file(form: str, tmp_path: Path) -> None:
    with (tmp_path / "s.txt").open("wb") as handle:
        handle.write(TEXT * 400)
        handle.seek(1 << 16, 1)
        handle.write(b"end\n")
    (tmp_path / "good.txt").write_bytes(b"good text\n")
    words = [form] if "format" in form else ["--format=pax", form]
    done = subprocess.run(["tar", "-S", *words, "-cf", "x.tar", "s.txt", "good.txt"], cwd=tmp_path, check=False)
    if done.returncode:
        pytest.skip("this tar does not know sparse files")
    reading = read(tmp_path, "x.tar", (tmp_path / "x.tar").read_bytes())
    assert paths(reading) == ["good.txt"]
    assert reasons(reading)["s.txt"].startswith("binary")


@pytest.mark.parametrize(
    "runs",
    [[(0, 600), (500, 100)], [(0, 1_000), (5_000, 10)], [(900, 100), (0, 900)]],
    ids=["overlap", "outside", "back"],
)
def test_sparse_maps_that_lie(runs: list[tuple[int, int]], tmp_path: Path) -> None:
    data = sparse_header(b"s.txt", 1_000, runs) + padded(bytes(sum(size for _, size in runs)))
    with pytest.raises(PackError, match="sparse map"):
        read(tmp_path, "x.tar", tar(data, GOOD_MEMBER))


def test_how_an_archive_may_end(tmp_path: Path) -> None:
    member = tar_member(b"a.txt", b"text\n")
    assert read(tmp_path, "x.tar", member + END).notes == ()
    assert read(tmp_path, "x.tar", member + END + bytes(50 * BLOCK)).notes == ()
    assert "one block of zeros" in read(tmp_path, "x.tar", member + bytes(BLOCK)).notes[0]
    assert "follows its end mark" in read(tmp_path, "x.tar", member + END + tar(GOOD_MEMBER)).notes[0]
    for damaged, reason in {
        member: "before the end mark",
        member + bytes(100): "cut at byte",
        member + bytes(BLOCK + 100): "cut at byte",
        member + bytes(BLOCK) + tar(GOOD_MEMBER): "lone block of zeros",
        member + b"x" * BLOCK + END: "the header at byte 1,024 is damaged",
        member[:-1]: "cut at byte 1,023",
    }.items():
        with pytest.raises(PackError, match=reason):
            read(tmp_path, "x.tar", damaged)


def test_links_with_a_size_have_no_data(tmp_path: Path) -> None:
    link = tar_header(b"link", 5_000, b"2", b"good.txt")
    assert paths(read(tmp_path, "x.tar", tar(link, GOOD_MEMBER))) == ["good.txt"]


def test_a_folder_that_is_stored_as_an_old_file_is_a_folder(tmp_path: Path) -> None:
    data = tar(tar_header(b"pkg/", 0, b"0"), tar_member(b"pkg/a.txt", b"text\n"), tar_member(b"pkg/b/c.txt", b"text\n"))
    reading = read(tmp_path, "x.tar", data)
    assert (paths(reading), reading.skips) == (["a.txt", "b/c.txt"], ())


def test_skipped_members_count_for_the_total(tmp_path: Path) -> None:
    data = archives.tar_of([("node_modules/a.js", bytes(100_000)), ("a.txt", b"x\n")])
    with pytest.raises(PackError, match="inflated in all"):
        read(tmp_path, "x.tar", data, max_total_bytes=100_000)
