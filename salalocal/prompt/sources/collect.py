"""Members on their way in -> documents and skips on a shelf: every check of a single member is made here.

For prompt/sources; the readers bring members, `arrange` gives the final names.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO

from salalocal.prompt.sources.document import Document, Member, Skip
from salalocal.prompt.sources.faults import Refused
from salalocal.prompt.sources.kinds import HEAD_BYTES, archive_kind, binary_kind
from salalocal.prompt.sources.labels import label_of
from salalocal.prompt.sources.limits import Meter, PackLimits, cap_text, size_text
from salalocal.prompt.sources.rules import file_reason, is_minified, skipped_tree, zip_document_reason
from salalocal.prompt.sources.text import decode
from salalocal.prompt.visible import quoted_name

_MAX_SHOWN_CHARS = 1_024
_MAX_NAMED = 3


@dataclass(frozen=True)
class Place:
    """Where a member was found: the label before its name, how many archives and folders deep, and in which kind.

    `has_rules` is false for files that were named one by one: those are read whatever they are called.
    """

    prefix: str = ""
    level: int = 1
    inside: str = "archive"
    has_rules: bool = True


NestedOpener = Callable[[BytesIO, Place], None]


@dataclass
class Shelf:
    """What one source gave. Its paths are those inside the source until `arrange` has seen all shelves.

    `hidden_folder` is the folder that was given, which its paths do not begin with.
    """

    name: str
    is_container: bool = False
    hidden_folder: str = ""
    documents: list[Document] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    trees: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip_tree(self, path: str, reason: str, num_members: int = 1) -> None:
        """Note a member of a tree that is skipped as a whole."""
        self.trees[path, reason] = self.trees.get((path, reason), 0) + num_members

    def all_skips(self) -> Iterator[Skip]:
        """All skips, those of a tree as one."""
        yield from self.skips
        for (path, reason), num_members in self.trees.items():
            yield Skip(path, f"{reason}, {num_members:,} files" if num_members > 1 else reason)


class Collector:
    """Takes members one by one and puts each on its shelf as a document or as a skip with its reason.

    `latest` is the label of the member that was begun last, for messages. `open_nested` reads an archive that lies
    in a member.
    """

    def __init__(self, limits: PackLimits, meter: Meter, open_nested: NestedOpener) -> None:
        self.limits = limits
        self.meter = meter
        self.shelf = Shelf("")
        self.latest = ""
        self._open_nested = open_nested

    def take(self, member: Member, place: Place) -> None:
        """Read one member. Raises Damage, LimitHit or Changed, which end its source."""
        label = label_of(member.name)
        path = self.latest = place.prefix + label.path
        self.meter.member()
        if member.name.endswith(b"/"):
            return
        if place.has_rules:
            tree, reason = skipped_tree(path)
            if tree:
                self.shelf.skip_tree(tree, reason)
                return
        try:
            self._check_name(member, path, place)
            document = self._read(member, path, place)
        except Refused as refusal:
            self.shelf.skips.append(Skip(_shortened(path), refusal.reason))
            return
        if document is not None:
            notes = (label.note, *document.notes) if label.note and place.has_rules else document.notes
            self.shelf.documents.append(replace(document, notes=notes))

    def largest(self) -> str:
        """Name the largest documents of this source, to say what to leave out."""
        documents = sorted(self.shelf.documents, key=lambda document: -document.num_bytes)[:_MAX_NAMED]
        return ", ".join(f"{quoted_name(found.path, 40)} {size_text(found.num_bytes)}" for found in documents)

    def _check_name(self, member: Member, path: str, place: Place) -> None:
        limits = self.limits
        if len(member.name) > limits.max_name_bytes:
            raise Refused(f"a name of {len(member.name):,} bytes, cap {limits.max_name_bytes:,} (--max-name)")
        if path.count("/") >= limits.max_path_depth:
            raise Refused(f"deeper than {limits.max_path_depth} folders (--max-path-depth)")
        if place.has_rules and (reason := file_reason(path)):
            raise Refused(reason)
        if member.num_bytes > limits.max_member_bytes:
            raise Refused(f"too large: {size_text(member.num_bytes)}, {self._member_cap}")
        if member.refusal:
            raise Refused(member.refusal)

    def _read(self, member: Member, path: str, place: Place) -> Document | None:
        chunks = iter(member.chunks)
        content = bytearray()
        while len(content) < HEAD_BYTES and (chunk := next(chunks, b"")):
            content += chunk
        is_archive = self._is_archive_to_open(bytes(content[:HEAD_BYTES]), path, place)
        while len(content) <= self.limits.max_member_bytes and (chunk := next(chunks, b"")):
            content += chunk
        if len(content) > self.limits.max_member_bytes:
            raise Refused(f"too large: more than {size_text(self.limits.max_member_bytes)}, {self._member_cap}")
        if is_archive:
            handle = BytesIO(content)
            content.clear()  # BytesIO has a copy
            self._open_nested(handle, Place(f"{path}/", place.level + 1))
            return None
        return self._document(member, path, content)

    @property
    def _member_cap(self) -> str:
        return f"cap {cap_text(self.limits.max_member_bytes)} (--max-member)"

    def _is_archive_to_open(self, head: bytes, path: str, place: Place) -> bool:
        """Look at the first bytes. Raises Refused for binaries and for archives that lie too deep."""
        kind = archive_kind(head)
        if not kind:
            if head.startswith(b"%PDF-"):
                raise Refused("PDF is not read yet")
            if binary := binary_kind(head):
                raise Refused(f"binary ({binary})")
            return False
        if kind == "zip" and (reason := zip_document_reason(path)):
            raise Refused(reason)
        if place.level >= self.limits.archive_depth:
            raise Refused(f"archive in {place.inside}, not opened (--depth {place.level + 1})")
        return True

    def _document(self, member: Member, path: str, content: bytearray) -> Document:
        decoded = decode(content, self.meter.check_text)
        if not decoded.text or decoded.text.isspace():
            raise Refused("only white space" if decoded.text else "empty")
        if is_minified(path, decoded.text):
            raise Refused("minified")
        self.meter.text(len(content))
        return Document(
            path=path,
            text=decoded.text,
            sha256=hashlib.sha256(content).hexdigest(),
            num_bytes=len(content),
            notes=(*member.notes, *decoded.notes),
            mtime=member.mtime,
            num_changes=member.num_changes,
        )


def _shortened(path: str) -> str:
    return path if len(path) <= _MAX_SHOWN_CHARS else f"{path[:_MAX_SHOWN_CHARS]}..."
