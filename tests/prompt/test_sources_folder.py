"""Folders: order, .gitignore as git applies it, what is not entered, and git's change counts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from archives import paths, reasons

from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import PackLimits, read_sources


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    make(tmp_path, dict.fromkeys(("b/z.py", "b/a.py", "a.py", "c.py", "B/x.py"), "x\n"))
    reading = read_sources([tmp_path])
    assert paths(reading) == ["B/x.py", "a.py", "b/a.py", "b/z.py", "c.py"]
    assert reading.notes == (f'"{tmp_path.name}": the folder "{tmp_path.name}/" is left out of all names',)


def test_gitignore_is_nested_and_the_inner_one_decides(tmp_path: Path) -> None:
    make(
        tmp_path,
        {
            ".gitignore": "*.log\n/build/\n!keep.log\n# note\nsecret.txt\n",
            "a.log": "x\n",
            "keep.log": "x\n",
            "build/out.txt": "x\n",
            "src/build/code.txt": "x\n",
            "src/.gitignore": "!debug.log\n*.tmp\nkeep.log\n",
            "src/debug.log": "x\n",
            "src/keep.log": "x\n",
            "src/x.tmp": "x\n",
            "x.tmp": "x\n",
            "deep/er/secret.txt": "x\n",
        },
    )
    reading = read_sources([tmp_path])
    assert paths(reading) == [
        ".gitignore",
        "keep.log",
        "src/.gitignore",
        "src/build/code.txt",
        "src/debug.log",
        "x.tmp",
    ]
    assert set(reasons(reading).values()) == {"ignored by .gitignore"}
    assert set(reasons(reading)) == {"a.log", "build/", "deep/er/secret.txt", "src/keep.log", "src/x.tmp"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_gitignore_agrees_with_git(tmp_path: Path) -> None:
    patterns = [
        "*.o",
        "!keep.o",
        "/top.txt",
        "docs/*.txt",
        "**/cache",
        "tmp*/",
        "a/**/z.py",
        "\\#x",
        "data/**",
        "!data/keep",
        "sp ace",
    ]
    names = ["x.o", "keep.o", "top.txt", "in/top.txt", "docs/a.txt", "docs/in/a.txt", "in/cache", "cache/f"]
    names += ["tmp1/f", "tmp", "a/z.py", "a/b/c/z.py", "#x", "data/f", "data/keep", "sp ace", "in/keep.o", "in/x.o"]
    make(tmp_path, {".gitignore": "\n".join(patterns), **dict.fromkeys(names, "x\n")})
    make(tmp_path, {"in/.gitignore": "!x.o\nkeep.o\n", "white/.gitignore": "*\n!*/\n!*.py\n!.gitignore\n"})
    make(tmp_path, dict.fromkeys(("white/a.py", "white/a.txt", "white/in/a.py", "white/in/a.txt", "star/in/a"), "x\n"))
    make(tmp_path, {"star/.gitignore": "*.txt\n!in/**\n", "star/in/b/c.txt": "x\n", "star/c.txt": "x\n"})
    make(tmp_path, {"slash/.gitignore": "/*/\n!/keep/\n**/b/c\n", "slash/x/a": "x\n", "slash/keep/b/c": "x\n"})
    make(
        tmp_path,
        {"slash/keep/c": "x\n", "slash/f": "x\n", "range/.gitignore": "[a-c]?.t[!x]t\n", "range/b1.txt": "x\n"},
    )
    make(tmp_path, {"range/b1.tyt": "x\n", "range/d1.tyt": "x\n", "range/in/a2.tzt": "x\n", "range/in/a.tzt": "x\n"})
    git(tmp_path, "init", "-q")
    listed = git(tmp_path, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    assert sorted(paths(read_sources([tmp_path]))) == sorted(name for name in listed if name)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_checkout_above_has_its_say(tmp_path: Path) -> None:
    make(tmp_path, {".gitignore": "*.log\nout/\n", "src/a.py": "x\n", "src/a.log": "x\n", "out/b.py": "x\n"})
    assert paths(read_sources([tmp_path / "src"])) == ["a.log", "a.py"]
    git(tmp_path, "init", "-q")
    make(tmp_path, {".git/info/exclude": "hidden.txt\n", "src/hidden.txt": "x\n"})
    assert paths(read_sources([tmp_path / "src"])) == ["a.py"]
    assert paths(read_sources([tmp_path / "out"])) == ["b.py"], "an ignored folder that is asked for is read"


def test_patterns_that_would_take_for_ever_are_not_used(tmp_path: Path) -> None:
    make(tmp_path, {".gitignore": "*a" * 30 + "b\n*.log\n", "a" * 250: "x\n", "x.log": "x\n"})
    reading = read_sources([tmp_path])
    assert paths(reading) == [".gitignore", "a" * 250]
    assert any("1 of 2 lines not used" in note for note in reading.notes)


def test_what_is_not_entered(tmp_path: Path) -> None:
    make(tmp_path, {"node_modules/a.js": "x\n", "src/__pycache__/a.pyc": "x\n", ".git/config": "x\n", "a.py": "x\n"})
    (tmp_path / "link").symlink_to("a.py")
    (tmp_path / "folder_link").symlink_to("src")
    (tmp_path / "inner.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    reading = read_sources([tmp_path])
    assert paths(reading) == ["a.py"]
    assert reasons(reading) == {
        "node_modules/": "vendored tree",
        "src/__pycache__/": "cache",
        ".git/": "version control folder",
        "link": "symbolic link, not followed",
        "folder_link": "symbolic link, not followed",
        "inner.zip": "archive in a folder, not opened (--depth 2)",
    }


def test_a_link_that_is_named_itself_is_followed(tmp_path: Path) -> None:
    make(tmp_path, {"real/a.py": "x\n"})
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").symlink_to("real/a.py")
    assert paths(read_sources([tmp_path / "link"])) == ["a.py"]
    assert paths(read_sources([tmp_path / "file"])) == ["file"]


def test_names_that_are_no_utf8_and_caps(tmp_path: Path) -> None:
    (tmp_path / b"n\xff.txt".decode("utf-8", "surrogateescape")).write_text("x\n")
    (tmp_path / "big.txt").write_text("x" * 2_000)
    reading = read_sources([tmp_path], PackLimits(max_member_bytes=1_000))
    assert paths(reading) == ["n\\xff.txt"]
    assert "too large" in reasons(reading)["big.txt"]
    with pytest.raises(Exception, match="more than 1 members"):
        read_sources([tmp_path], PackLimits(max_members=1))


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_hot_files_come_last_in_a_git_checkout(tmp_path: Path) -> None:
    make(tmp_path, {"README.md": "x\n", "sub/a.py": "x\n", "sub/b.py": "x\n", "c d é.py": "x\n"})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "1")
    for text in ("y\n", "z\n"):
        make(tmp_path, {"sub/a.py": text, "c d é.py": text * 2, "README.md": text})
        git(tmp_path, "commit", "-qam", "2")
    reading = read_sources([tmp_path])
    assert [document.num_changes for document in reading.documents] == [3, 3, 3, 1]
    assert [document.path for document in PromptPack.build(reading)] == [
        "README.md",
        "sub/b.py",
        "c d é.py",
        "sub/a.py",
    ]
    assert [document.num_changes for document in read_sources([tmp_path / "sub"]).documents] == [3, 1]


SIGNER = """#!/bin/sh
cat > /dev/null
echo "[GNUPG:] SIG_CREATED " >&2
printf -- '-----BEGIN PGP SIGNATURE-----\\n\\nx\\n-----END PGP SIGNATURE-----\\n'
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_cannot_make_git_start_programs(tmp_path: Path) -> None:
    repository, sprung = make(tmp_path / "repository", {"a.py": "x\n"}), tmp_path / "sprung"
    make(tmp_path, {"signer": SIGNER, "trap": f"#!/bin/sh\ntouch {sprung}\n"})
    for name in ("signer", "trap"):
        (tmp_path / name).chmod(0o755)
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "-c", f"gpg.program={tmp_path}/signer", "commit", "-S", "-qm", "1")
    for key in ("core.fsmonitor", "core.pager", "gpg.program", "diff.external", "core.sshCommand"):
        git(repository, "config", key, f"{tmp_path}/trap")
    git(repository, "config", "log.showSignature", "true")
    git(repository, "log", "--name-only")
    assert sprung.exists(), "the trap is none"
    sprung.unlink()
    reading = read_sources([repository])
    assert [document.num_changes for document in reading.documents] == [1]
    assert not sprung.exists()


def test_a_folder_that_is_found_again_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"a.py": "x\n", "loop/b.py": "x\n"})
    real_stat = os.stat

    def mounted_again(path: str, **options: bool) -> os.stat_result:
        return real_stat(tmp_path if str(path).endswith("loop") else path, **options)

    monkeypatch.setattr(os, "stat", mounted_again)
    reading = read_sources([tmp_path])
    assert paths(reading) == ["a.py"]
    assert reasons(reading) == {"loop/": "folder already read under another name"}


def test_without_git_the_order_is_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {".git/HEAD": "x\n", "b.py": "x\n", "a.py": "x\n"})
    monkeypatch.setenv("PATH", "")
    assert [document.path for document in PromptPack.build(read_sources([tmp_path]))] == ["a.py", "b.py"]
