"""Stored names -> labels: what a document is called in the prompt and on the screen; for the readers.

A label is only ever shown. No path is built from it, on any system.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from salalocal.prompt.visible import quoted_name, visible_name

_UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Label:
    """A safe name, and what had to be changed to make it one ("" when nothing was)."""

    path: str
    note: str = ""


def label_of(name: bytes) -> Label:
    """Make a label: "/" as the only separator, no root, no "..", nothing unseen, no tag brackets."""
    text = name.decode("utf-8", "surrogateescape")
    changes = []
    if "\\" in text:
        changes.append("backslashes read as /")
    parts = text.replace("\\", "/").split("/")
    if parts[0] == "" and len(parts) > 1:
        changes.append("leading / dropped")
    if ".." in parts:
        changes.append("outside name, .. removed")
    plain = "/".join(part for part in parts if part not in ("", ".", ".."))
    path = _shown(plain)
    if path != plain:
        changes.append("characters escaped")
    if not path:
        path = "unnamed"
        changes.append("no name left")
    if not changes:
        return Label(path)
    return Label(path, f"stored as {quoted_name(_shown_bytes(text))}: {', '.join(changes)}")


def _shown_bytes(text: str) -> str:
    return _UNDECODED.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)


def _shown(text: str) -> str:
    # Tag brackets are escaped too, so that a name cannot close the <source> it stands in.
    return visible_name(_shown_bytes(text)).replace("<", "\\x3c").replace(">", "\\x3e")


class Numbering:
    """Gives every document a path of its own: twins (by case or Unicode form too) become `name (2)`."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {_key(path) for path in taken}
        self._next: dict[str, int] = {}

    def unique(self, path: str) -> str:
        """Take a path, numbered if one like it is taken already."""
        key = candidate_key = _key(path)
        candidate = path
        number = self._next.get(key, 2)
        while candidate_key in self._taken:
            candidate = f"{path} ({number})"
            candidate_key = _key(candidate)
            number += 1
        self._taken.add(candidate_key)
        self._next[key] = number
        return candidate


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def common_top(paths: Iterable[str]) -> str:
    """Find the one folder that all paths lie in, as "name/", or "" when there is none."""
    tops = set()
    for path in paths:
        top, slash, _ = path.partition("/")
        if not slash:
            return ""
        tops.add(top)
        if len(tops) > 1:
            return ""
    return f"{tops.pop()}/" if tops else ""
