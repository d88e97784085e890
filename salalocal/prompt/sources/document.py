"""The types that readers and packs pass on: Member inside a source; Document, Skip and Reading to the outside."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Document:
    """One text that stands in the prompt.

    `path` is a label that is safe to show and never a path to open. `sha256` and `num_bytes` are those of the
    bytes as read, before decoding. `mtime` (Unix seconds) and `num_changes` (commits of the git checkout that
    touched the file) only serve to order a pack.
    """

    path: str
    text: str
    sha256: str
    num_bytes: int
    notes: tuple[str, ...] = ()
    mtime: float = 0.0
    num_changes: int = 0


@dataclass(frozen=True)
class Skip:
    """One file, member or tree (its path ends in "/") that was not read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """Everything that `read_sources` found, in the order it was given and stored.

    `notes` speak of the sources first, then sum up those of the documents; they may be shown as they are.
    """

    documents: tuple[Document, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Member:
    """One entry of a folder or an archive on its way through the checks.

    `name` is the name as stored. `chunks` yields the content once, in order; `refusal` says why there is none to
    yield. `num_bytes` is the size the source claims, which nothing relies on.
    """

    name: bytes
    num_bytes: int
    chunks: Iterable[bytes] = ()
    mtime: float = 0.0
    num_changes: int = 0
    refusal: str = ""
    notes: list[str] = field(default_factory=list)
