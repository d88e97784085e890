"""A conversation as the model reads it: system text, documents and turns come in, Segments of token ids go out; for
the session and for training.

The prompt form, with the ChatML template (each line below is one segment, encoded by itself):

    <s><|im_start|>system\\n                                                      template, if there is a system text
    {system}                                                                     system
    <|im_end|>\\n<|im_start|>user\\n                                               template (begins with <s> otherwise)
    <documents>\\n                                                                template
    <document index="1">\\n<source>{path}</source>\\n<document_content>\\n{text}\\n</document_content>\\n</document>\\n
                                                                                 document; save point after the last
    </documents>                                                                 template
    \\n\\n{question}                                                               question ({question} in later turns)
    <|im_end|>\\n<|im_start|>assistant\\n                                          template
    {answer}                                                                     answer: ids as given; save point
    <|im_end|>\\n<|im_start|>user\\n                                               template, and so on

Only the chat template's own text can hold control tokens. It is rendered with a random placeholder for each content, so
that it never reads a content and no content is ever taken for template text. The segments of a conversation are the
beginning of those of the same conversation with more turns; a template that breaks this is refused.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from salalocal.prompt.model_folder import damaged, read_json, read_text
from salalocal.prompt.sandbox import RenderError, render, render_apart
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.prompt.tokenizer_file import Place

if TYPE_CHECKING:
    from salalocal.prompt.pack import PromptPack
    from salalocal.prompt.sources import Document

MAX_TEMPLATE_BYTES = 2**20
MAX_CONFIG_BYTES = 8 * 2**20
STANDARD_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML; the one template that is rendered in this process. Every other one is rendered apart, with limits."""

SegmentKind = Literal["template", "system", "document", "question", "answer"]


@dataclass(frozen=True)
class Segment:
    """Token ids that stand together; `label` is the path of a document, else a word for what it is.

    `is_save_point`: the state after this segment is worth keeping, because other ends may follow it.
    """

    ids: tuple[int, ...]
    kind: SegmentKind
    label: str
    is_save_point: bool = False


@dataclass(frozen=True)
class Turn:
    """A question and its answer in token ids; None while there is none."""

    question: str
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """What is to be read: an optional system text, documents, and turns; only the last turn may lack its answer."""

    system: str | None = None
    pack: "PromptPack | None" = None
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if any(turn.answer is None for turn in self.turns[:-1]):
            raise ValueError("only the last turn may be without an answer")


@dataclass
class _Writer:
    """Collects segments and knows in which place the next text stands."""

    tokenizer: Tokenizer
    segments: list[Segment] = field(default_factory=list)
    place: Place = Place.START

    def text(self, text: str, kind: SegmentKind, label: str) -> None:
        self.add(self.tokenizer.encode(text, self.place), kind, label)

    def template(self, text: str) -> None:
        ids = self.tokenizer.encode_template(text, self.place)
        bos_id = self.tokenizer.bos_id
        if not self.segments and bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        self.add(ids, "template", "template")

    def add(self, ids: list[int], kind: SegmentKind, label: str, is_save_point: bool = False) -> None:
        self.place = self.tokenizer.place_after(ids, self.place)
        if ids or is_save_point:
            self.segments.append(Segment(tuple(ids), kind, label, is_save_point))


class ChatTemplate:
    """A model's chat template with its tokenizer: conversations in, segments out. `digest` names the template text."""

    def __init__(self, text: str, tokenizer: Tokenizer, path: Path) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._path = path
        self._frames: dict[tuple[bool, int], tuple[str, ...]] = {}
        self._documents: dict[tuple[int, str, str], list[int]] = {}
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> Self:
        """Open the chat template of a model folder: chat_template.jinja, else the one in tokenizer_config.json.

        Raises: CheckpointError, naming the file and the reason.
        """
        folder = Path(folder)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        path = folder / "chat_template.jinja"
        text = read_text(path, MAX_TEMPLATE_BYTES)
        if text is None:
            path = folder / "tokenizer_config.json"
            text = _template_in((read_json(path, MAX_CONFIG_BYTES) or {}).get("chat_template"))
        if text is None or len(text) > MAX_TEMPLATE_BYTES:
            raise damaged(path, f"no chat template of at most {MAX_TEMPLATE_BYTES:,} bytes")
        return cls(text, tokenizer, path)

    def render(self, conversation: Conversation) -> list[Segment]:
        """The conversation in segments.

        With an open question the segments end where the answer begins. Without one they end at the last save point:
        after the last answer, or, before any turn, after the documents. An end-of-answer token at the end of a given
        answer is left out, since the template brings its own.

        Raises: CheckpointError for a template that cannot be used; RequestError for text that is no Unicode.
        """
        turns = conversation.turns
        num_questions = len(turns) if turns and turns[-1].answer is None else len(turns) + 1
        texts = iter(self._frame(conversation.system is not None, num_questions))
        writer = _Writer(self._tokenizer)
        writer.template(next(texts))
        if conversation.system is not None:
            writer.text(conversation.system, "system", "system")
            writer.template(next(texts))
        has_documents = self._write_documents(writer, conversation.pack)
        for number, turn in enumerate(turns, 1):
            question = turn.question
            if number == 1 and has_documents:
                writer.text("</documents>", "template", "template")
                question = "\n\n" + question
            writer.text(question, "question", f"question {number}")
            writer.template(next(texts))
            if turn.answer is None:
                break
            writer.add(self._without_end(turn.answer), "answer", f"answer {number}", is_save_point=True)
            if number < len(turns):
                writer.template(next(texts))
        return writer.segments

    def count_document_tokens(self, pack: "PromptPack") -> list[tuple[str, int]]:
        """The tokens that each document of a pack takes in the prompt, with its frame, in order: (path, tokens)."""
        return [(document.path, len(ids)) for document, ids in self._encode_documents(pack)]

    def _write_documents(self, writer: _Writer, pack: "PromptPack | None") -> bool:
        if pack is None or not pack.documents:
            return False
        writer.text("<documents>\n", "template", "template")
        for number, (document, ids) in enumerate(self._encode_documents(pack), 1):
            writer.add(ids, "document", document.path, is_save_point=number == len(pack.documents))
        return True

    def _encode_documents(self, pack: "PromptPack") -> "Iterator[tuple[Document, list[int]]]":
        """Each document with its ids; those of the pack that was read last are kept."""
        known, self._documents = self._documents, {}
        for number, document in enumerate(pack.documents, 1):
            key = (number, document.path, document.text)
            ids = known.get(key)
            if ids is None:
                ids = self._tokenizer.encode(document_text(number, document))
            self._documents[key] = ids
            yield document, ids

    def _without_end(self, answer: tuple[int, ...]) -> list[int]:
        return list(answer[:-1] if answer and answer[-1] in self._tokenizer.eos_ids else answer)

    def _frame(self, has_system: bool, num_questions: int) -> tuple[str, ...]:
        """The template's own texts: before, between and behind the contents of a conversation with an open question.

        Raises: CheckpointError if a further turn changes what came before it.
        """
        frame = self._rendered(has_system, num_questions)
        if num_questions > 1:
            shorter = self._rendered(has_system, num_questions - 1)
            if frame[: len(shorter)] != shorter:
                raise damaged(self._path, "the chat template rewrites earlier turns when one is added, not supported")
        return frame

    def _rendered(self, has_system: bool, num_questions: int) -> tuple[str, ...]:
        shape = (has_system, num_questions)
        if shape not in self._frames:
            self._frames[shape] = self._render_frame(has_system, num_questions)
        return self._frames[shape]

    def _render_frame(self, has_system: bool, num_questions: int) -> tuple[str, ...]:
        nonce = secrets.token_hex(16)
        roles = ["system"] * has_system + ["user", "assistant"] * num_questions
        messages = [{"role": role, "content": f"Q{nonce}N{n}E"} for n, role in enumerate(roles[:-1])]
        variables = {
            **self._tokenizer.named_tokens,
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        is_known = self._text.removesuffix("\n") in (STANDARD_TEMPLATE, STANDARD_TEMPLATE.replace("\\n", "\n"))
        try:
            text = (render if is_known else render_apart)(self._text, variables)
        except RenderError as error:
            raise damaged(self._path, f"chat template: {error}") from error
        parts = re.split(f"Q{nonce}N([0-9]+)E", text)
        for number, message in enumerate(messages):
            if parts[1::2].count(str(number)) != 1:
                raise damaged(
                    self._path, f"chat template loses, doubles or alters message {number + 1} ({message['role']})"
                )
        if [int(number) for number in parts[1::2]] != list(range(len(messages))) or nonce in "".join(parts).lower():
            raise damaged(self._path, "chat template reorders or alters the messages")
        return tuple(parts[::2])


def document_text(number: int, document: "Document") -> str:
    """A document as it stands in the prompt; `number` counts from 1."""
    end = "" if document.text.endswith("\n") else "\n"
    return (
        f'<document index="{number}">\n<source>{document.path}</source>\n<document_content>\n'
        f"{document.text}{end}</document_content>\n</document>\n"
    )


def _template_in(value: object) -> str | None:
    """The template of tokenizer_config.json: text, or the one named default in a list."""
    if isinstance(value, list):
        default = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = default[0].get("template") if default else None
    return value if isinstance(value, str) else None
