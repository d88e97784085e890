"""Whole readings: names of several sources, standard input, caps at their edges, memory, and how notes are told."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import archives
import pytest
from archives import paths, reasons, tar_of, written, zip_of

from salalocal.errors import PackError, RequestError
from salalocal.prompt.sources import PackLimits, Reading, read_sources


def test_documents_hold_what_was_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "déjà vu\r\n".encode())
    os.utime(path, (1_700_000_000, 1_700_000_000))
    (document,) = read_sources([path]).documents
    assert document.text == "déjà vu\r\n"
    assert document.num_bytes == 11
    assert document.sha256 == hashlib.sha256("déjà vu\r\n".encode()).hexdigest()
    assert document.mtime == 1_700_000_000


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("format", [0, 1, 2], ids=["ustar", "gnu", "pax"])
def test_every_tar_gives_the_same(tmp_path: Path, suffix: str, format: int) -> None:
    deep = "pkg-1.0/" + "/".join(["a-long-folder-name"] * 7) + "/module.py"
    files = [("pkg-1.0/README.md", b"# pkg\n"), (deep, b"x = 1\n")]
    data = archives.PACKERS[suffix](tar_of(files, format))
    reading = read_sources([written(tmp_path / f"pkg.tar{suffix}", data)])
    assert paths(reading) == ["README.md", deep.removeprefix("pkg-1.0/")]
    assert reading.notes == (f'"pkg.tar{suffix}": the folder "pkg-1.0/" is left out of all names',)
    assert [document.text for document in reading.documents] == ["# pkg\n", "x = 1\n"]


@pytest.mark.parametrize("method", [0, 8, 12])
def test_every_zip_gives_the_same(tmp_path: Path, method: int) -> None:
    data = zip_of([("pkg/a.py", b"x = 1\n" * 1000), ("pkg/b/", b""), ("other/c.py", b"y\n")], method)
    reading = read_sources([written(tmp_path / "pkg.zip", data)])
    assert paths(reading) == ["pkg/a.py", "other/c.py"]
    assert reading.documents[0].text == "x = 1\n" * 1000


def test_one_compressed_file_is_a_document_without_its_suffix(tmp_path: Path) -> None:
    reading = read_sources([written(tmp_path / "notes.txt.gz", gzip.compress(b"some notes\n"))])
    assert paths(reading) == ["notes.txt"]


def test_names_say_their_source_when_there_are_several(tmp_path: Path) -> None:
    (tmp_path / "repo" / "src").mkdir(parents=True)
    written(tmp_path / "repo" / "src" / "config.py", b"A = 1\n")
    one = written(tmp_path / "one.tar", tar_of([("one-1.0/config.py", b"B = 2\n"), ("one-1.0/x.py", b"x\n")]))
    two = written(tmp_path / "two.zip", zip_of([("config.py", b"C = 3\n"), ("lib/x.py", b"x\n")]))
    assert paths(read_sources([tmp_path / "repo"])) == ["src/config.py"]
    note = written(tmp_path / "note.txt", b"note\n")
    assert paths(read_sources([tmp_path / "repo", note])) == ["src/config.py", "note.txt"]
    reading = read_sources([tmp_path / "repo", one, two, note])
    expected = [
        "repo/src/config.py",
        "one-1.0/config.py",
        "one-1.0/x.py",
        "two.zip/config.py",
        "two.zip/lib/x.py",
        "note.txt",
    ]
    assert paths(reading) == expected


def test_files_are_called_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    written(tmp_path / "src" / "a.py", b"x\n")
    monkeypatch.chdir(tmp_path)
    assert paths(read_sources(["src/a.py"])) == ["src/a.py"]
    assert paths(read_sources(["./src/../src/a.py"])) == ["a.py"]
    assert paths(read_sources([tmp_path / "src" / "a.py"])) == ["a.py"]
    assert reasons(read_sources(["src/a.py", tmp_path / "src" / "a.py"])) == {"a.py": "given twice"}


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("uv.lock", "jquery.min.js", "a.js.map"):
        assert paths(read_sources([written(tmp_path / name, b"text\n")])) == [name]


def test_missing_paths_are_errors(tmp_path: Path) -> None:
    good = written(tmp_path / "a.txt", b"x\n")
    with pytest.raises(PackError, match=r'cannot read ".*missing.txt": No such file'):
        read_sources([good, tmp_path / "missing.txt"])
    with pytest.raises(PackError, match="no name that a file can have"):
        read_sources(["a\0b"])
    with pytest.raises(PackError, match="damaged"):
        read_sources([written(tmp_path / "a.zip", b"no zip at all\n")])


@pytest.mark.parametrize(
    "data",
    [
        b"plain text\n",
        gzip.compress(b"plain text\n", mtime=0),
        tar_of([("stdin", b"plain text\n")]),
        gzip.compress(tar_of([("stdin", b"plain text\n")]), mtime=0),
        zip_of([("stdin", b"plain text\n")]),
    ],
)
def test_standard_input(data: bytes) -> None:
    (document,) = read_sources(["-"], stdin=io.BytesIO(data)).documents
    assert (document.path, document.text) == ("stdin", "plain text\n")


def test_standard_input_only_once_and_only_as_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError):
        read_sources(["-", "-"], stdin=io.BytesIO(b"x\n"))
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "-", b"a file called so\n")
    assert read_sources([Path("-")]).documents[0].text == "a file called so\n"
    assert read_sources(["./-"]).documents[0].text == "a file called so\n"


def test_a_zip_through_a_pipe_is_capped() -> None:
    data = zip_of([("a.txt", os.urandom(5_000).hex().encode())])
    with pytest.raises(PackError, match="a zip through a pipe is held in memory"):
        read_sources(["-"], PackLimits(max_member_bytes=4_096), io.BytesIO(data))


def test_what_is_skipped_by_name_in_an_archive(tmp_path: Path) -> None:
    names = {
        "node_modules/a/index.js": "vendored tree",
        "vendor/b.go": "vendored tree",
        ".git/config": "version control folder",
        ".venv/x.py": "virtual environment",
        "src/__pycache__/a.pyc": "cache",
        "pkg.egg-info/PKG-INFO": "package metadata",
        "package-lock.json": "lock file",
        "Cargo.lock": "lock file",
        "app.min.js": "minified",
        "app.js.map": "source map",
        "long.js": "minified",
        "book.docx": "office documents and e-books are not read yet",
        "._a.txt": "macOS resource fork",
    }
    contents = {"long.js": b"var a=1;" * 2000, "book.docx": zip_of([("word.xml", b"<a/>")])}
    files = [(name, contents.get(name, b"text\n")) for name in names] + [
        ("vendor/c.go", b"text\n"),
        ("good.py", b"x = 1\n"),
    ]
    reading = read_sources([written(tmp_path / "x.tar", tar_of(files))])
    assert paths(reading) == ["good.py"]
    found = reasons(reading)
    for name, reason in names.items():
        tree = next((path for path in found if path.endswith("/") and name.startswith(path)), name)
        assert found[tree].startswith(reason), name
    assert found["vendor/"] == "vendored tree, 2 files"


def test_caps_at_their_edges(tmp_path: Path) -> None:
    data = tar_of([("a.txt", b"a" * 1_000), ("b.txt", b"b" * 200_000)])
    path = written(tmp_path / "x.tar", data)

    def read(**limits: int) -> Reading:
        return read_sources([path], PackLimits(**limits))  # type: ignore[arg-type]

    assert paths(read(max_member_bytes=200_000)) == ["a.txt", "b.txt"]
    cap = "cap 199,999 bytes (--max-member)"
    assert reasons(read(max_member_bytes=199_999)) == {"b.txt": f"too large: 200.0 kB, {cap}"}
    read(max_total_bytes=len(data))
    with pytest.raises(PackError, match=r'inflated in all \(--max-total\), at "b.txt"'):
        read(max_total_bytes=150_000)
    with pytest.raises(PackError, match="inflated in all"):
        read(max_total_bytes=len(data) - 1)
    read(max_members=2)
    with pytest.raises(PackError, match=r'more than 1 members \(--max-members\), at "b.txt"'):
        read(max_members=1)
    read(max_text_bytes=201_000)
    with pytest.raises(PackError, match=r'of text in all \(--max-text\), at "b.txt"') as caught:
        read(max_text_bytes=200_999)
    assert '"a.txt" 1.0 kB' in caught.value.hint
    assert paths(read(max_text_bytes=200_999, partial=True)) == ["a.txt"]
    assert paths(read(max_name_bytes=5)) == ["a.txt", "b.txt"]
    with pytest.raises(PackError, match="a name of 5 bytes, cap 4"):
        read(max_name_bytes=4)


def test_the_cap_on_depth(tmp_path: Path) -> None:
    deep = written(tmp_path / "deep.tar", tar_of([("1/2/3.txt", b"x\n"), ("4.txt", b"y\n")]))
    assert paths(read_sources([deep], PackLimits(max_path_depth=3))) == ["1/2/3.txt", "4.txt"]
    assert paths(read_sources([deep], PackLimits(max_path_depth=2))) == ["4.txt"]
    with pytest.raises(RequestError, match="max_members must be above zero"):
        PackLimits(max_members=0)


def test_the_time_cap_names_the_place(tmp_path: Path) -> None:
    path = written(tmp_path / "x.tar", tar_of([(f"{i}.txt", b"x\n") for i in range(50)]))
    with pytest.raises(PackError, match=r"CPU time \(--max-read-seconds\)"):
        read_sources([path], PackLimits(max_cpu_s=1e-6))


def test_caps_count_over_all_sources(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{i}.txt", b"x" * 100) for i in range(3)]
    read_sources(files, PackLimits(max_total_bytes=300, max_members=3, max_text_bytes=300))
    for limits in (PackLimits(max_total_bytes=299), PackLimits(max_members=2), PackLimits(max_text_bytes=299)):
        with pytest.raises(PackError, match=r'"2\.txt"'):
            read_sources(files, limits)


def test_notes_of_many_documents_are_one_line_for_each_kind(tmp_path: Path) -> None:
    files = [(f"{i}.txt", "café ouvert\n".encode("latin-1")) for i in range(10)]
    notes = read_sources([written(tmp_path / "x.tar", tar_of(files))]).notes
    assert notes == ('"0.txt", "1.txt", "2.txt" and 7 more: decoded as cp1252, a guess',)
    odd = [(f"../{i}.txt", b"x\n") for i in range(50)]
    assert len(read_sources([written(tmp_path / "x.tar", tar_of(odd))]).notes) == 21


def test_messages_are_short_and_printable(tmp_path: Path) -> None:
    name = "\x1b[2J" + "x" * 90
    data = archives.tar(archives.tar_member(name.encode(), b"text\n"))
    for damaged in (data[:600], data[:-1024]):
        with pytest.raises(PackError) as caught:
            read_sources([written(tmp_path / ("y" * 200 + ".tar"), damaged)])
        assert len(caught.value.message) <= 300
        assert caught.value.message.isprintable()


CHILD = """
import io, resource, sys
from itertools import chain, repeat
from salalocal.prompt.sources import read_sources

class Generated(io.RawIOBase):
    def __init__(self, pieces):
        self.pieces = pieces
    def read(self, size=-1):
        return next(self.pieces, b"")

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
words = b"words " * 174_000
pieces = chain(["\\U0001f600".encode()], repeat(words, 63))
text = read_sources(["-"], stdin=Generated(pieces)).documents[0].text
print(len(text), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
def test_memory_for_the_largest_text_stays_below_512_mib() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    num_chars, grown_kib = map(int, done.stdout.split())
    assert num_chars > 60_000_000
    assert grown_kib < 512 * 1024
