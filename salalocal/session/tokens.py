"""Where the tokens go: segments of a prompt in, a count for each document out; for `tokens`, /tokens and overflows.

Imports no torch, so that counting costs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salalocal.checkpoint.hub import is_builtin
from salalocal.errors import ContextError
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Skip
from salalocal.prompt.template import ChatTemplate, Conversation, Segment
from salalocal.prompt.tokenizer import Tokenizer

BUILTIN_MAX_TOKENS = 512
MAX_TOKENS = 4096
QUESTION_TOKENS = 256  # what a question and its frame are expected to take
MAX_ANSWER_ROOM = 8192

_NAMED_IN_ERROR = 3


@dataclass(frozen=True)
class DocumentTokens:
    """One document and the tokens it takes in the prompt, with its frame."""

    path: str
    tokens: int
    num_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenReport:
    """The documents of a prompt, what else takes tokens, what was skipped. Units: tokens."""

    documents: tuple[DocumentTokens, ...]
    other_tokens: int
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    context_limit: int | None = None

    @property
    def document_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(document.tokens for document in self.documents)

    @property
    def num_files(self) -> str:
        """How many documents, in words."""
        return "1 file" if len(self.documents) == 1 else f"{len(self.documents):,} files"

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.document_tokens + self.other_tokens

    def largest(self, count: int) -> list[DocumentTokens]:
        """The documents with the most tokens, the largest first."""
        return sorted(self.documents, key=lambda document: -document.tokens)[:count]


class ContextOverflow(ContextError):
    """A prompt that does not fit the context; `report` has the counts per file. Nothing was cut."""

    def __init__(self, report: TokenReport, limit: int) -> None:
        largest = ", ".join(
            f"{document.path[-60:]} {document.tokens:,}" for document in report.largest(_NAMED_IN_ERROR)
        )
        is_talk = report.other_tokens > report.document_tokens
        super().__init__(
            f"{report.total_tokens:,} tokens do not fit a context of {limit:,} tokens "
            f"({report.total_tokens - limit + 1:,} too many): {report.document_tokens:,} in {report.num_files}, "
            f"{report.other_tokens:,} in questions, answers and frame; nothing was cut",
            "ask a shorter question, or /undo some turns" if is_talk else f"leave files out; the largest are {largest}",
        )
        self.report = report


@dataclass(frozen=True, eq=False)
class TextCodec:
    """The half of a model that is about text: its tokenizer and its chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def from_folder(cls, folder: Path) -> "TextCodec":
        """Open both from a model folder. Raises: CheckpointError."""
        tokenizer = Tokenizer.from_folder(folder)
        return cls(tokenizer, ChatTemplate.from_folder(folder, tokenizer))

    def report(self, pack: PromptPack | None, system: str | None = None) -> TokenReport:
        """Count the tokens of a pack as it stands in a prompt."""
        return report_tokens(self.template.render(Conversation(system, pack)), pack)


def report_tokens(
    segments: Sequence[Segment], pack: PromptPack | None, context_limit: int | None = None
) -> TokenReport:
    """Sort the tokens of a rendered conversation by document."""
    counts = [len(segment.ids) for segment in segments if segment.kind == "document"]
    documents = pack.documents if pack is not None else ()
    return TokenReport(
        documents=tuple(
            DocumentTokens(document.path, tokens, document.num_bytes, document.notes)
            for document, tokens in zip(documents, counts, strict=True)
        ),
        other_tokens=sum(len(segment.ids) for segment in segments if segment.kind != "document"),
        context_limit=context_limit,
    )


def answer_room(max_tokens: int) -> int:
    """The room to make at once for an answer, in tokens: a longer one is rare, and the state grows for it."""
    return min(max_tokens, MAX_ANSWER_ROOM)


def default_max_tokens(name: str) -> int:
    """How long an answer may get if nobody says: the built-in model copies lines, others may think first."""
    return BUILTIN_MAX_TOKENS if is_builtin(name) else MAX_TOKENS
