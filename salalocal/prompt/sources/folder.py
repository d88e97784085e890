"""A folder on the disk -> its files as members, in the order of their names; for prompt/sources.

Symbolic links are not followed. .gitignore files are honoured as git does, those above the folder too when it lies
in a git checkout.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pathspec import GitIgnoreSpec

from salalocal.errors import PackError
from salalocal.prompt.sources.collect import Collector, Place
from salalocal.prompt.sources.document import Member, Skip
from salalocal.prompt.sources.faults import Changed, Refused
from salalocal.prompt.sources.files import open_file, system_reason
from salalocal.prompt.sources.git import change_counts
from salalocal.prompt.sources.labels import label_of
from salalocal.prompt.sources.rules import tree_reason
from salalocal.prompt.visible import quoted_name, visible

_MAX_IGNORE_BYTES = 1 << 20
# A part of a pattern with more wildcards is nothing that people write, but can take for ever to match.
_MAX_WILDCARDS = 4
_MAX_PATTERNS = 10_000
_PLACE = Place(inside="a folder")
# The group of pathspec's patterns that holds the slash behind a folder they fit.
_FOLDER_GROUP = "ps_d"
# What lets a file through (False) or keeps it out (True), the last pattern of the file first.
_Patterns = tuple[tuple[bool, re.Pattern[str]], ...]
# The folder of each .gitignore that applies, outermost first, with its patterns.
_Ignores = tuple[tuple[str, _Patterns], ...]


@dataclass(frozen=True)
class _Folder:
    path: str
    label: str  # "" or ending in "/", relative to the folder that was given
    ignores: _Ignores


class FolderReader:
    """Walks one folder, depth first, and hands every file to the collector."""

    def __init__(self, root: Path, collector: Collector) -> None:
        self._root = os.path.realpath(root)
        self._collector = collector
        self._seen: set[tuple[int, int]] = set()
        self._num_changes: dict[str, int] = {}

    def read(self) -> None:
        """Read the folder. Raises LimitHit, or PackError for a file that keeps changing."""
        repository = _repository_of(self._root)
        if repository:
            self._num_changes = change_counts(self._root)
        open_folders = [iter(self._entries(_Folder(self._root, "", _outer_ignores(self._root, repository))))]
        while open_folders:
            found = next(open_folders[-1], None)
            if found is None:
                open_folders.pop()
                continue
            folder, entry = found
            if inner := self._visit(folder, entry):
                open_folders.append(iter(self._entries(inner)))

    def _entries(self, folder: _Folder) -> list[tuple[_Folder, os.DirEntry[str]]]:
        """List a folder by name, with the patterns of its own .gitignore added."""
        try:
            status = os.stat(folder.path)  # noqa: PTH116
            with os.scandir(folder.path) as listing:
                entries = list(islice(listing, self._collector.limits.max_members + 1))
        except OSError as error:
            self._skip(folder.label, system_reason(error))
            return []
        if (status.st_dev, status.st_ino) in self._seen:
            self._skip(folder.label, "folder already read under another name")
            return []
        self._seen.add((status.st_dev, status.st_ino))
        if any(entry.name == ".gitignore" for entry in entries):
            patterns = self._patterns(f"{folder.path}{os.sep}.gitignore")
            folder = replace(folder, ignores=(*folder.ignores, (folder.path, patterns)))
        return [(folder, entry) for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name))]

    def _patterns(self, path: str) -> _Patterns:
        patterns, notes = read_patterns(path)
        self._collector.shelf.notes.extend(notes)
        return patterns

    def _visit(self, folder: _Folder, entry: os.DirEntry[str]) -> _Folder | None:
        """Read a file or skip it; give back a folder that is to be entered."""
        label = folder.label + entry.name
        try:
            is_folder = entry.is_dir(follow_symlinks=False)
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            self._skip(label, system_reason(error))
            return None
        if not is_folder:
            if _is_ignored(folder.ignores, entry.path):
                self._skip(label, "ignored by .gitignore")
            else:
                self._take(entry.path, label, status)
            return None
        self._collector.meter.member()
        if reason := tree_reason(entry.name):
            self._collector.shelf.skip_tree(_shown(label) + "/", reason, 0)
        elif _is_ignored(folder.ignores, entry.path + "/"):
            self._skip(label + "/", "ignored by .gitignore")
        elif label.count("/") + 1 >= self._collector.limits.max_path_depth:
            self._skip(label + "/", f"deeper than {self._collector.limits.max_path_depth} folders (--max-path-depth)")
        else:
            return _Folder(entry.path, label + "/", folder.ignores)
        return None

    def _take(self, path: str, label: str, status: os.stat_result) -> None:
        for is_last_try in (False, True):
            member = Member(os.fsencode(label), status.st_size, mtime=status.st_mtime)
            member.num_changes = self._num_changes.get(label, 0)
            member.chunks = self._chunks(path, member)
            try:
                self._collector.take(member, _PLACE)
                return
            except Changed as error:
                if not is_last_try:
                    continue
                if not self._collector.limits.partial:
                    raise PackError(
                        f"{quoted_name(path)} {error.reason}, twice", "wait until it is written, or leave it out"
                    ) from error
                self._skip(label, error.reason)

    def _chunks(self, path: str, member: Member) -> Iterator[bytes]:
        opened = open_file(path)
        with opened.handle:
            yield from opened.pieces(self._collector.meter, member)

    def _skip(self, label: str, reason: str) -> None:
        self._collector.shelf.skips.append(Skip(_shown(label) + ("/" if label.endswith("/") else ""), reason))


def _shown(label: str) -> str:
    return label_of(os.fsencode(label)).path


def _repository_of(root: str) -> str:
    """Find the git checkout that a folder lies in, or ""."""
    for folder in (Path(root), *Path(root).parents):
        if os.path.exists(folder / ".git"):  # noqa: PTH110 - Path.exists raises where one may not look
            return str(folder)
    return ""


def _outer_ignores(root: str, repository: str) -> _Ignores:
    """Collect the patterns of the checkout's folders above the one that is read.

    None of them apply when they would ignore that very folder: it was asked for by name.
    """
    if not repository:
        return ()
    exclude = os.path.join(repository, ".git", "info", "exclude")  # noqa: PTH118
    ignores: list[tuple[str, _Patterns]] = [(repository, read_patterns(exclude)[0])]
    parents = [str(folder) for folder in Path(root).parents if len(str(folder)) >= len(repository)]
    for folder in reversed(parents):
        ignores.append((folder, read_patterns(os.path.join(folder, ".gitignore"))[0]))  # noqa: PTH118
    chain = [folder for folder in (*reversed(parents), root) if folder != repository]
    if any(_is_ignored(tuple(ignores), folder + "/") for folder in chain):
        return ()
    return tuple(ignores)


def read_patterns(path: str) -> tuple[_Patterns, list[str]]:
    """Read a .gitignore: its patterns, and notes on those that are passed over."""
    try:
        opened = open_file(path)
        with opened.handle:
            text = opened.handle.read(_MAX_IGNORE_BYTES + 1).decode("utf-8", "replace")
    except (Refused, OSError):
        return (), []  # not there, or nothing that git would read either
    lines = text[:_MAX_IGNORE_BYTES].removeprefix("\ufeff").splitlines()
    kept = [line for line in lines if _is_plain(line)][:_MAX_PATTERNS]
    notes = (
        []
        if len(kept) == len(lines)
        else [f"{quoted_name(path)}: {len(lines) - len(kept)} of {len(lines)} lines not used"]
    )
    try:
        patterns = list(GitIgnoreSpec.from_lines(kept).patterns)
    except ValueError as error:
        return (), [f"{quoted_name(path)} was not used: {visible(str(error))}"]
    regexes = ((pattern.include, getattr(pattern, "regex", None)) for pattern in reversed(patterns))
    return tuple((include, regex) for include, regex in regexes if include is not None and regex), notes


def _is_plain(pattern: str) -> bool:
    return pattern.count("**") <= _MAX_WILDCARDS and all(
        part.count("*") <= _MAX_WILDCARDS for part in pattern.split("/")
    )


def _is_ignored(ignores: _Ignores, path: str) -> bool:
    """Ask the innermost .gitignore that says anything; `path` ends in "/" for a folder."""
    for folder, patterns in reversed(ignores):
        inner = path[len(folder) :].lstrip(os.sep).replace(os.sep, "/")
        for is_kept_out, regex in patterns:
            if _fits_itself(regex, inner):
                return is_kept_out
    return False


def _fits_itself(regex: re.Pattern[str], path: str) -> bool:
    """Whether a pattern fits this file or folder, not only a folder above it.

    The library's own matching is made for lists of paths without a walk: there a pattern for a folder speaks for
    all below it, which in a walk it must not, since a later pattern may let one of them in again.
    """
    if _FOLDER_GROUP not in regex.groupindex:  # "a/**": everything in a, but not a
        return regex.search(path.rstrip("/")) is not None
    end = len(path) if path.endswith("/") else -1
    return any(found.end(_FOLDER_GROUP) == end for found in regex.finditer(path))
