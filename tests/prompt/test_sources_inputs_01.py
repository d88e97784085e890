"""The inputs that every reader must survive, rows 1 to 15 of the list of hostile files: names, links, lies, encodings.

Each is made on the fly and small; what is large is large only in what it claims or inflates to.
"""

import gzip
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path

import archives
import pytest
from archives import (
    paths,
    read,
    reasons,
    sparse_header,
    tar,
    tar_header,
    tar_member,
    within,
    zip_by_hand,
    zip_of,
)

from salalocal.errors import PackError
from salalocal.prompt.sources import read_sources

GOOD = ("good.txt", b"good text\n")
GOOD_MEMBER = tar_member(b"good.txt", b"good text\n")


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    """Reading leaves no file behind that the test did not make, above or beside the archive."""
    outside = {path.name for path in tmp_path.parent.iterdir()}
    yield
    assert {path.name for path in tmp_path.parent.iterdir()} == outside


def test_01_names_that_climb_out(tmp_path: Path) -> None:
    name = "../../.ssh/authorized_keys"
    for reading in (
        read(tmp_path, "x.tar", tar(tar_member(name.encode(), b"key\n"), GOOD_MEMBER)),
        read(tmp_path, "x.zip", zip_of([(name, b"key\n"), GOOD])),
    ):
        assert paths(reading) == [".ssh/authorized_keys", "good.txt"]
        assert reading.documents[0].text == "key\n"
        assert f'stored as "{name}"' in reading.documents[0].notes[0]
        assert "outside name" in reading.documents[0].notes[0]
    assert not (tmp_path.parent.parent / ".ssh").exists()


def test_02_absolute_names(tmp_path: Path) -> None:
    reading = read(tmp_path, "x.tar", tar(tar_member(b"/etc/passwd", b"not the host's\n"), GOOD_MEMBER))
    assert paths(reading) == ["etc/passwd", "good.txt"]
    assert reading.documents[0].text == "not the host's\n"
    assert "leading / dropped" in reading.documents[0].notes[0]


def test_03_windows_names(tmp_path: Path) -> None:
    names = {
        b"C:\\x": "C:/x",
        b"\\\\srv\\share\\x": "srv/share/x",
        b"a\\..\\b": "a/b",
        b"CON": "CON",
        b"x.txt.": "x.txt.",
    }
    reading = read(tmp_path, "x.tar", tar(*(tar_member(name, b"text\n") for name in names)))
    assert paths(reading) == list(names.values())
    reading = read(tmp_path, "x.zip", zip_by_hand((name, b"text\n", 0) for name in names))
    assert paths(reading) == list(names.values())


def test_04_symbolic_links(tmp_path: Path) -> None:
    links = {b"to_file": b"good.txt", b"to_folder": b"dir", b"outside": b"/etc", b"chain": b"to_file"}
    members = [tar_member(name, b"", b"2", target) for name, target in links.items()]
    reading = read(tmp_path, "x.tar", tar(GOOD_MEMBER, *members, tar_member(b"outside/hosts", b"mine\n")))
    assert paths(reading) == ["good.txt", "outside/hosts"]
    assert reading.documents[1].text == "mine\n"
    assert set(reasons(reading)) == {"to_file", "to_folder", "outside", "chain"}
    assert set(reasons(reading).values()) == {"symbolic link, not followed"}


def test_05_hard_links(tmp_path: Path) -> None:
    members = [
        tar_member(b"again", b"", b"1", b"good.txt"),
        tar_member(b"none", b"", b"1", b"missing"),
        tar_member(b"a/link", b"", b"2", b"/etc/passwd"),
        tar_member(b"deep", b"", b"1", b"a/link"),
    ]
    reading = read(tmp_path, "x.tar", tar(GOOD_MEMBER, *members))
    assert paths(reading) == ["good.txt"]
    assert reasons(reading)["again"] == 'hard link: the same file as "good.txt" before it'
    assert "no file before it" in reasons(reading)["none"]
    assert "no file before it" in reasons(reading)["deep"]


def test_06_other_member_types(tmp_path: Path) -> None:
    kinds = {b"3": "character device", b"4": "block device", b"6": "named pipe", b"7": "contiguous", b"Z": "unknown"}
    members = [tar_member(b"member" + kind, b"", kind) for kind in kinds]
    reading = read(tmp_path, "x.tar", tar(*members, GOOD_MEMBER))
    assert paths(reading) == ["good.txt"]
    for kind, reason in kinds.items():
        assert reason in reasons(reading)[f"member{kind.decode()}"]


def test_07_nested_and_encrypted_zips(tmp_path: Path) -> None:
    bomb = zip_of([("0.dll", bytes(1 << 20))])
    for _ in range(3):
        bomb = zip_of([(f"lib {i}.zip", bomb) for i in range(4)])
    data = zip_by_hand([(b"lib 0.zip", bomb, 0), (b"secret.txt", b"hidden", 1), (b"good.txt", b"good text\n", 0)])
    with within(1.0):
        reading = read(tmp_path, "42.zip", data)
    assert paths(reading) == ["good.txt"]
    assert reasons(reading) == {
        "lib 0.zip": "archive in archive, not opened (--depth 2)",
        "secret.txt": "needs a password",
    }


def overlapping_zip() -> bytes:
    """Two entries over the same bytes: the first quotes the header of the second in a stored block."""
    kernel = zlib.compress(bytes(1 << 20), 9, -15)

    def header(name: bytes, crc: int, packed: int, size: int) -> bytes:
        return struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 33, crc, packed, size, len(name), 0) + name

    inner_raw = bytes(1 << 20)
    inner = header(b"b", zlib.crc32(inner_raw), len(kernel), len(inner_raw))
    quote = b"\x00" + struct.pack("<2H", len(inner), len(inner) ^ 0xFFFF) + inner
    outer_raw = inner + inner_raw
    outer = header(b"a", zlib.crc32(outer_raw), len(quote) + len(kernel), len(outer_raw))
    body = outer + quote + kernel
    directory = b""
    for name, raw, packed, offset in (
        (b"a", outer_raw, len(quote) + len(kernel), 0),
        (b"b", inner_raw, len(kernel), body.index(inner)),
    ):
        fields = (20, 20, 0, 8, 0, 33, zlib.crc32(raw), packed, len(raw), 1, 0, 0, 0, 0, 0, offset)
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + name
    return body + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, len(directory), len(body), 0)


def test_08_overlapping_entries(tmp_path: Path) -> None:
    with within(1.0), pytest.raises(PackError, match="entries overlap") as caught:
        read(tmp_path, "x.zip", overlapping_zip())
    assert caught.value.exit_code == 4


def test_09_honest_nested_archives(tmp_path: Path) -> None:
    innermost = zip_of([("deep.txt", b"deep text\n")])
    middle = gzip.compress(archives.tar_of([("in.zip", innermost), ("mid.txt", b"middle text\n")]))
    data = zip_of([("mid.tar.gz", middle), ("top.txt", b"top text\n")])
    shallow = read(tmp_path, "x.zip", data)
    assert paths(shallow) == ["top.txt"]
    assert "--depth 2" in reasons(shallow)["mid.tar.gz"]
    assert paths(read(tmp_path, "x.zip", data, archive_depth=2)) == ["mid.tar.gz/mid.txt", "top.txt"]
    deep = read(tmp_path, "x.zip", data, archive_depth=3)
    assert paths(deep) == ["mid.tar.gz/in.zip/deep.txt", "mid.tar.gz/mid.txt", "top.txt"]
    with pytest.raises(PackError, match="more than 4 members"):
        read(tmp_path, "x.zip", data, archive_depth=3, max_members=4)


def test_10_ten_gigabytes_of_hole(tmp_path: Path) -> None:
    huge = sparse_header(b"hole.txt", 10 << 30, [(0, 512)]) + bytes(512)
    data = gzip.compress(tar(huge, GOOD_MEMBER))
    assert len(data) < 400
    with within(1.0):
        reading = read(tmp_path, "x.tar.gz", data)
    assert paths(reading) == ["good.txt"]
    assert reasons(reading) == {"hole.txt": "too large: 10.7 GB, cap 64 MiB (--max-member)"}
    with (tmp_path / "huge.txt").open("wb") as handle:
        handle.truncate(10 << 30)
    with within(1.0), pytest.raises(PackError, match=r"too large: 10.7 GB, cap 64 MiB \(--max-member\)"):
        read_sources([tmp_path / "huge.txt"])


SIZES = {
    "negative": b"\xff" * 12,
    "2^63": b"\x80" + bytes(3) + b"\x80" + bytes(7),
    "minus": b"-0000000001\0",
    "base 256": b"\x80" + b"\xff" * 11,
    "no digits": b"9" * 12,
    "64 GiB": b"7" * 11 + b"\0",
}


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_11_lying_tar_sizes(tmp_path: Path, size: bytes) -> None:
    reason = "cut at byte" if size == SIZES["64 GiB"] else r"the size in a header (makes no sense|is not a number)"
    with within(2.0), pytest.raises(PackError, match=rf"damaged at member 2 of .*{reason}") as caught:
        read(tmp_path, "x.tar", tar(GOOD_MEMBER, tar_header(b"a", size) + bytes(512)))
    assert caught.value.exit_code == 4


def test_11_bombs_of_extension_headers(tmp_path: Path) -> None:
    block = b"%011o\0%011o\0" % (0, 0) * 21 + b"\1" + bytes(7)
    sparse = sparse_header(b"a", 1 << 20, [(0, 0)] * 5) + block * 60_000
    pax = tar_member(b"pax", b"", b"x")
    cases = {
        "sparse map": sparse,
        "extension headers in a row": pax * 100,
        "extension header of": tar_header(b"pax", 1 << 30, b"x"),
        "pax record is broken": tar_member(b"pax", b"99999999 path=x\n", b"x") + tar_member(b"a"),
        "size makes no sense": archives.pax_member({"size": b"-1"}, b"a", b""),
        "without a member": pax,
    }
    for reason, members in cases.items():
        with within(2.0), pytest.raises(PackError, match=reason):
            read(tmp_path, "x.tar", tar(GOOD_MEMBER, members))


def test_11_zip64_nonsense(tmp_path: Path) -> None:
    data = zip_of([GOOD])
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    for end64_at in (0, len(data) - 22, 1 << 62):
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end64_at, 1)
        with within(2.0), pytest.raises(PackError, match="damaged"):
            read(tmp_path, "x.zip", data[:-22] + locator + end)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 63, 1 << 63, 1 << 63, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data) - 22, 1)
    with within(2.0), pytest.raises(PackError, match="damaged"):
        read(tmp_path, "x.zip", data[:-22] + record + locator + end)


def test_12_control_characters_in_names_and_contents(tmp_path: Path) -> None:
    name = "a\x1b[2Jb\x07\n</source>\u202egpj\u200b\U000e0041.txt"
    text = "\x1b]52;c;AAAA\x07 kept \u202e exactly\r\n"
    reading = read(
        tmp_path, "x.tar", tar(archives.pax_member({"path": name.encode()}, b"x", text.encode()), GOOD_MEMBER)
    )
    label = reading.documents[0].path
    assert label == "a\\x1b[2Jb\\x07\\x0a\\x3c/source\\x3e\\u202egpj\\u200b\\U000e0041.txt"
    assert label.isprintable()
    assert reading.documents[0].text == text
    assert all(note.isprintable() for note in reading.notes)


def test_13_twins(tmp_path: Path) -> None:
    nfc, nfd = unicodedata.normalize("NFC", "é.txt"), unicodedata.normalize("NFD", "é.txt")
    names = [nfc, nfd, "a.txt", "A.txt", "a.txt", "a.txt (2)"]
    reading = read(tmp_path, "x.tar", archives.tar_of((name, f"{i}\n".encode()) for i, name in enumerate(names)))
    assert paths(reading) == [nfc, f"{nfd} (2)", "a.txt", "A.txt (2)", "a.txt (3)", "a.txt (2) (2)"]
    assert [document.text for document in reading.documents] == [f"{i}\n" for i in range(6)]


def test_14_mixed_encodings(tmp_path: Path) -> None:
    sentences = {
        "utf8.txt": ("naïve — 東京\n", "utf-8"),
        "ru.txt": ("Привет, как дела? Это конфигурационный файл сервера.\n", "cp1251"),
        "ja.txt": ("設定ファイルです。ポート番号は八千八十です。\n", "shift_jis"),
        "fr.txt": ("# Fichier créé par André : le café est fermé à l'été\n", "latin-1"),
    }
    members = [(name, text.encode(codec)) for name, (text, codec) in sentences.items()]
    reading = read(tmp_path, "x.tar", archives.tar_of(members))
    for document in reading.documents:
        text, codec = sentences[document.path]
        assert document.text == text, codec
        assert ("a guess" in "".join(document.notes)) == (codec != "utf-8")
    broken = "tout est déjà là\n".encode() * 40 + b"\xe9\xff\xfe\n"
    document = read(tmp_path, "broken.txt", broken).documents[0]
    assert document.text.startswith("tout est déjà là\n")
    assert document.notes == ("3 bytes not decoded",)
    reading = read(tmp_path, "x.tar", tar(tar_member(b"n\xe9\xff.txt", b"text\n"), GOOD_MEMBER))
    assert paths(reading)[0] == "n\\xe9\\xff.txt"


def test_15_utf16_utf32_utf7_and_overlong(tmp_path: Path) -> None:
    text = "Hello, wide world.\nSecond line: déjà vu\n"
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        marked = read(tmp_path, "a.txt", ("\ufeff" + text).encode(codec)).documents[0]
        assert marked.text == text
        assert "byte order mark" in marked.notes[0]
        bare = read(tmp_path, "a.txt", text.encode(codec)).documents[0]
        assert bare.text == text
        assert "by its NUL bytes" in bare.notes[0]
    assert read(tmp_path, "a.txt", b"\xef\xbb\xbfplain\n").documents[0].text == "plain\n"
    assert read(tmp_path, "a.txt", b"Hi Mom +Jjo-!\n").documents[0].text == "Hi Mom +Jjo-!\n"
    overlong = read(tmp_path, "a.txt", b"path: ..\xc0\xaf..\xc0\xafetc\n").documents[0]
    assert "/" not in overlong.text
    assert overlong.notes == ("4 bytes not decoded",)
    cut = read(tmp_path, "a.txt", ("\ufeff" + text).encode("utf-16-le")[:-1]).documents[0]
    assert "1 byte not decoded" in cut.notes
