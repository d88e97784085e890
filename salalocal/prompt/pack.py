"""Documents -> a pack: what the prompt holds, in the order it holds it; for the session and the command line.

Packs never change: `add` and `drop` give new ones. Two packs with the same paths and texts in the same order are
equal and have the same digest, whatever files they came from.
"""

import difflib
import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from salalocal.errors import PackError, RequestError
from salalocal.prompt.sources.document import Document, Reading
from salalocal.prompt.sources.labels import Numbering
from salalocal.prompt.visible import quoted_name

# Manifests that say what a project is, in the order they should be read.
_MANIFESTS = (
    *("pyproject.toml", "setup.py", "setup.cfg", "package.json", "cargo.toml", "go.mod", "pom.xml", "build.gradle"),
    *("build.gradle.kts", "composer.json", "gemfile", "cmakelists.txt", "makefile", "pkg-info"),
)
_MAX_NAMED = 3
_MAX_COMPARED = 2_000


@dataclass(frozen=True)
class ManifestEntry:
    """One line of a pack's table of contents: the label, and the bytes it was read from."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, eq=False)
class PromptPack:
    """Ordered documents; hashable and comparable by their content."""

    documents: tuple[Document, ...] = ()

    @classmethod
    def build(cls, reading: Reading, order: str = "auto") -> "PromptPack":
        """Put the documents of a reading in order.

        "auto": README and manifests first, then by git changes if there are any, else by path. "git": by the
        number of latest commits that touched the file, so that hot files come last, where an edit costs little and
        the question is near. "mtime": oldest first. "path"; "given": as read. Ties by path.
        Raises RequestError for another word.
        """
        if order not in _ORDERS:
            raise RequestError(f"no order is called {quoted_name(order)}", f"use one of {', '.join(_ORDERS)}")
        return cls(tuple(_ORDERS[order](reading.documents)))

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptPack) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over paths and texts in order, as hexadecimal digits."""
        total = hashlib.sha256()
        for document in self.documents:
            for part in (document.path, document.text):
                total.update(hashlib.sha256(part.encode()).digest())
        return total.hexdigest()

    @property
    def manifest(self) -> tuple[ManifestEntry, ...]:
        """The table of contents."""
        return tuple(ManifestEntry(document.path, document.sha256, document.num_bytes) for document in self.documents)

    @property
    def num_bytes(self) -> int:
        """Bytes read for all documents together."""
        return sum(document.num_bytes for document in self.documents)

    def add(self, documents: Iterable[Document]) -> "PromptPack":
        """Append documents, so that what was read before stays read; known ones are left out, twins are numbered."""
        known = {(document.path, document.sha256) for document in self.documents}
        numbering = Numbering(document.path for document in self.documents)
        new = [document for document in documents if (document.path, document.sha256) not in known]
        named = (replace(document, path=numbering.unique(document.path)) for document in new)
        return PromptPack((*self.documents, *named))

    def drop(self, path: str) -> "PromptPack":
        """Leave out one document, by its path or by an end of it that fits no other.

        Raises PackError naming the documents that could be meant.
        """
        found = self.find(path)
        return PromptPack(tuple(document for document in self.documents if document is not found))

    def find(self, path: str) -> Document:
        """Find one document, by its path or by an end of it that fits no other. Raises PackError as `drop` does."""
        wanted = path.removeprefix("./")
        exact = [document for document in self.documents if document.path == wanted]
        fitting = exact or [document for document in self.documents if document.path.endswith(f"/{wanted}")]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise PackError(
                f"{quoted_name(path)} fits {len(fitting)} documents: {_listed(fitting)}", "give more of the path"
            )
        names = {posixpath.basename(document.path): document for document in self.documents[:_MAX_COMPARED]}
        close = difflib.get_close_matches(posixpath.basename(wanted), names, n=_MAX_NAMED)
        hint = f"did you mean {_listed([names[name] for name in close])}?" if close else "/tokens lists the documents"
        raise PackError(f"no document is called {quoted_name(path)}", hint)


def _listed(documents: list[Document]) -> str:
    names = ", ".join(quoted_name(document.path, 60) for document in documents[:_MAX_NAMED])
    return f"{names} and {len(documents) - _MAX_NAMED} more" if len(documents) > _MAX_NAMED else names


def _lead_rank(path: str, top: int) -> int | None:
    """0 for a README, then manifests in their order; None for everything else, and below the top of the tree."""
    if path.count("/") > top:
        return None
    name = posixpath.basename(path).lower()
    if name.partition(".")[0] == "readme":
        return 0
    return 1 + _MANIFESTS.index(name) if name in _MANIFESTS else None


def _auto_order(documents: Sequence[Document]) -> list[Document]:
    # Names of several folders or archives all begin with theirs: then the top of the tree is one folder down.
    top = min((document.path.count("/") for document in documents), default=0)

    def key(document: Document) -> tuple[int, int, str]:
        rank = _lead_rank(document.path, top)
        return (1, document.num_changes, document.path) if rank is None else (0, rank, document.path)

    return sorted(documents, key=key)


_ORDERS: dict[str, Callable[[Sequence[Document]], Iterable[Document]]] = {
    "auto": _auto_order,
    "path": lambda documents: sorted(documents, key=lambda document: document.path),
    "git": lambda documents: sorted(documents, key=lambda document: (document.num_changes, document.path)),
    "mtime": lambda documents: sorted(documents, key=lambda document: (document.mtime, document.path)),
    "given": lambda documents: documents,
}
