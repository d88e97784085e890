"""Texts as token ids: shipped conversations or a user's files in, sequences out; to calibrate on, and to evaluate.

The shipped texts are conversations about small archives, in `salalocal/texts/`, one JSON object a line:

    {"documents": [{"path": ..., "text": ...}, ...], "turns": [{"question": ..., "answer": ...}, ...]}

They are rendered by the model's own chat template. What is calibrated on and what is evaluated share no document;
`salalocal/texts/SOURCES.md` says where everything comes from, and under which licence.
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from salalocal.errors import RequestError
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Document, Reading, read_sources
from salalocal.prompt.template import Conversation, Turn
from salalocal.session.start import Sources, tell_skips
from salalocal.session.tokens import TextCodec

CALIBRATION, EVALUATION = "calibration", "evaluation"
DEFAULT_SEQUENCE_TOKENS = 16_384
MIN_SEQUENCE_TOKENS = 32
EVALUATION_TOKENS = 32_768

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TokenText:
    """Texts as token ids, each as it stands in a prompt, its start token in front; `name` says what they are."""

    name: str
    texts: tuple[Ids, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))


def shipped_text(name: str, codec: TextCodec) -> TokenText:
    """The shipped texts of that name: CALIBRATION or EVALUATION. Raises: CheckpointError for a template that cannot."""
    lines = lzma.decompress(shipped_bytes(name)).decode().splitlines()
    conversations = (_conversation(json.loads(line), codec) for line in lines)
    return TokenText(f"the shipped {name} text", tuple(_ids(codec, conversation) for conversation in conversations))


def shipped_bytes(name: str) -> bytes:
    """The packed file of shipped texts."""
    return (resources.files("salalocal") / "texts" / f"{name}.jsonl.xz").read_bytes()


def file_text(sources: Sources, codec: TextCodec, tell: Callable[[str], None]) -> TokenText:
    """The files as the documents of one prompt. Raises: PackError, RequestError."""
    reading = read_sources(sources.paths, sources.limits, sources.stdin)
    tell_skips(reading, tell)
    pack = PromptPack.build(reading, sources.order)
    name = "1 file" if len(pack.documents) == 1 else f"{len(pack.documents):,} files"
    return TokenText(name, (_ids(codec, Conversation(None, pack)),))


def cut_sequences(
    text: TokenText, sequence_tokens: int = DEFAULT_SEQUENCE_TOKENS, max_tokens: int | None = None
) -> list[Ids]:
    """Cut texts into sequences of at most `sequence_tokens`, `max_tokens` in all.

    Every piece of a text begins with the start token, which is the first one of the text. A rest of a few tokens is
    dropped. Raises: RequestError if nothing is left.
    """
    sequences: list[Ids] = []
    num_used = 0
    for piece in (piece for ids in text.texts for piece in _pieces(ids, max(2, sequence_tokens))):
        kept = piece if max_tokens is None else piece[: max_tokens - num_used]
        if len(kept) >= MIN_SEQUENCE_TOKENS:
            sequences.append(kept)
            num_used += len(kept)
    if not sequences:
        longest = sequence_tokens if max_tokens is None else min(sequence_tokens, max_tokens)
        raise RequestError(
            f"{text.name}: {text.num_tokens:,} tokens in pieces of at most {longest:,}, "
            f"at least {MIN_SEQUENCE_TOKENS} are needed",
            "give a longer text, such as a folder of documents or source code",
        )
    return sequences


def digest(sequences: Iterable[Sequence[int]]) -> str:
    """sha256 over token ids, which names them on a card."""
    return hashlib.sha256(json.dumps([list(sequence) for sequence in sequences]).encode()).hexdigest()


def _pieces(ids: Ids, num_tokens: int) -> list[Ids]:
    rests = (ids[start : start + num_tokens - 1] for start in range(num_tokens, len(ids), num_tokens - 1))
    return [ids[:num_tokens], *(ids[:1] + rest for rest in rests)]


def _conversation(record: dict[str, list[dict[str, str]]], codec: TextCodec) -> Conversation:
    documents = tuple(_document(document["path"], document["text"]) for document in record["documents"])
    turns = tuple(Turn(turn["question"], tuple(codec.tokenizer.encode(turn["answer"]))) for turn in record["turns"])
    return Conversation(None, PromptPack.build(Reading(documents), "given"), turns)


def _document(path: str, text: str) -> Document:
    data = text.encode()
    return Document(path, text, hashlib.sha256(data).hexdigest(), len(data))


def _ids(codec: TextCodec, conversation: Conversation) -> Ids:
    return tuple(token for segment in codec.template.render(conversation) for token in segment.ids)
