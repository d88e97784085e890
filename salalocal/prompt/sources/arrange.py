"""Shelves, one per source -> one Reading in which every document has a short name of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from salalocal.prompt.sources.collect import Shelf
from salalocal.prompt.sources.document import Document, Reading, Skip
from salalocal.prompt.sources.labels import Numbering, common_top
from salalocal.prompt.visible import quoted_name

_MAX_NOTES = 20
_MAX_NAMED = 3


def arrange(shelves: Sequence[Shelf]) -> Reading:
    """Give the final names: without the one folder everything lies in, under their source's name if it is not the
    only folder or archive, and numbered where two would be alike.
    """
    has_several = sum(shelf.is_container for shelf in shelves) > 1
    numbering = Numbering()
    documents: list[Document] = []
    skips: list[Skip] = []
    notes: list[str] = []
    for shelf in shelves:
        top = common_top(_paths(shelf)) if shelf.is_container else ""
        prefix = (top or f"{shelf.name}/") if has_several and shelf.is_container else ""
        if hidden := shelf.hidden_folder or top:
            what = "stands first in all names" if prefix else "is left out of all names"
            notes.append(f"{quoted_name(shelf.name)}: the folder {quoted_name(hidden)} {what}")
        documents += (
            _named(document, prefix + document.path.removeprefix(top), numbering) for document in shelf.documents
        )
        skips += (Skip(prefix + (skip.path.removeprefix(top) or skip.path), skip.reason) for skip in shelf.all_skips())
        notes += shelf.notes
    return Reading(tuple(documents), tuple(skips), (*notes, *_told(documents)))


def _paths(shelf: Shelf) -> Iterable[str]:
    """The names that say whether there is a common folder: if nothing was read from the source, none do."""
    if not shelf.documents or shelf.hidden_folder:
        return []
    skipped = (skip.path for skip in shelf.skips)
    trees = (path for path, _ in shelf.trees if path != "__MACOSX/")
    return [*(document.path for document in shelf.documents), *skipped, *trees]


def _named(document: Document, path: str, numbering: Numbering) -> Document:
    unique = numbering.unique(path)
    if unique == path:
        return replace(document, path=path)
    return replace(document, path=unique, notes=(*document.notes, f"a file like {quoted_name(path)} comes before it"))


def _told(documents: Iterable[Document]) -> list[str]:
    """The notes of all documents, each kind on one line."""
    paths: dict[str, list[str]] = {}
    for document in documents:
        for note in document.notes:
            paths.setdefault(note, []).append(document.path)
    lines = []
    for note, found in list(paths.items())[:_MAX_NOTES]:
        more = f" and {len(found) - _MAX_NAMED:,} more" if len(found) > _MAX_NAMED else ""
        lines.append(f"{', '.join(map(quoted_name, found[:_MAX_NAMED]))}{more}: {note}")
    if len(paths) > _MAX_NOTES:
        lines.append(f"{len(paths) - _MAX_NOTES:,} more notes on single documents")
    return lines
