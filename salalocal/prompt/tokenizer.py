"""Text to token ids and back: a model folder comes in, a Tokenizer goes out; for the template, the session, training.

Promises, for every tokenizer that from_folder accepts:

- encode(text) never yields the id of an added token, special or not, whatever the text holds.
- decode(encode(text)) == text, exactly. Decoding is concatenation: decode(a + b) is decode(a) followed by decode(b)
  (where a ends between two characters), and no space is added or dropped.
- Time grows linearly with the text. Text is cut into chunks of about 8 Ki characters, behind a line end or before a
  space, each between two visible characters, and only if no piece of the vocabulary crosses such a place. The split
  patterns of GPT-2, Llama 3, Qwen and the embedded model break there too, so these cuts do not change ids. Only where
  64 Ki characters hold no such place (a minified line) is a cut forced, at the same place for the same text.
- Text with a lone surrogate is refused with its position, since UTF-8 cannot hold it; it is never replaced in silence.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from salalocal.errors import CheckpointError, RequestError
from salalocal.prompt.model_folder import damaged
from salalocal.prompt.tokenizer_file import (
    SPACE_MARK,
    Place,
    TokenizerFile,
    byte_alphabet,
    byte_piece,
    read_tokenizer_file,
)

CHUNK_CHARS = 8 * 1024
MAX_CHUNK_CHARS = 64 * 1024
BATCH_CHUNKS = 128  # bounds what the library holds at once to the tokens of about a million characters
_SPACE = re.compile(r"\s+")
_LINE_END, _WORD_END = r"(?<=\S)\n(?=\S)", r"(?<=\S)(?= \S)"


class Tokenizer:
    """A model's tokenizer, with a wall between plain text and control tokens.

    `control_ids` holds the ids of all added tokens, `bos_id` the id put first (None: none is), `eos_ids` the ids that
    end an answer, `named_tokens` the texts of bos_token, eos_token and their like.
    """

    def __init__(self, file: TokenizerFile) -> None:
        try:
            self._plain = tokenizers.Tokenizer.from_str(file.plain_json)
        except BaseException as error:
            raise _refused(file.path, error) from None
        self._path = file.path
        self._pieces = file.pieces
        self._control = {token.content: token for token in file.control}
        self._ids = {piece: i for i, piece in file.pieces.items()}
        self._is_byte_level = file.is_byte_level
        self._prefix_rule = file.prefix_rule
        self._mark_ids = [] if file.is_byte_level else [self._ids[byte_piece(b)] for b in SPACE_MARK.encode()]
        self._bytes: dict[int, bytes] = {}
        self._cut_pattern = _safe_cuts(file)
        self.control_ids = frozenset(token.id for token in file.control)
        self.vocab_size = max(file.pieces) + 1
        self.bos_id = file.bos_id
        self.eos_ids = file.eos_ids
        self.named_tokens = file.named_tokens
        self._check_wall()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Open the tokenizer of a model folder.

        Raises: CheckpointError, naming the file and the reason.
        """
        return cls(read_tokenizer_file(Path(folder)))

    @property
    def has_prefix_space(self) -> bool:
        """Whether the model saw a space put before text (SentencePiece), so that an answer may begin with one."""
        return bool(self._prefix_rule.places)

    def encode(self, text: str, place: Place = Place.TEXT) -> list[int]:
        """The ids of plain text; none is a control token.

        `place` says what stands before the text; it matters only to SentencePiece tokenizers, which put a space
        before text at the start and behind a control token. Inside text nothing is added.

        Raises: RequestError for a lone surrogate.
        """
        _check_unicode(text)
        ids: list[int] = []
        batch: list[str] = []
        for chunk in self._chunks(self._prefix_rule.apply(text, place)):
            batch.append(chunk)
            if len(batch) == BATCH_CHUNKS:
                ids += self._encode_batch(batch)
                batch = []
        return ids + self._encode_batch(batch) if batch else ids

    def encode_template(self, text: str, place: Place = Place.START) -> list[int]:
        """The ids of a chat template's own text, in which control tokens are themselves.

        They are so wherever they stand: the flags `single_word` and `normalized` of the file are not obeyed.

        Raises: RequestError for a lone surrogate.
        """
        ids: list[int] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            token = self._control[match.group()]
            before = text[end : match.start()]
            ids += self.encode(before.rstrip() if token.strips_left else before, self.place_after(ids, place))
            ids.append(token.id)
            end = match.end()
            if token.strips_right and (space := _SPACE.match(text, end)):
                end = space.end()
        return ids + self.encode(text[end:], self.place_after(ids, place))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of plain text as the whole prompt: the start token first, if the model has one."""
        start = [] if self.bos_id is None else [self.bos_id]
        return start + self.encode(text, Place.START)

    def place_after(self, ids: list[int], before: Place) -> Place:
        """The place right behind these ids, when they were encoded at `before`."""
        if not ids:
            return before
        return Place.CONTROL if ids[-1] in self.control_ids else Place.TEXT

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of ids; control tokens are left out, or written as they are spelled.

        Bytes that are not UTF-8 and ids without a piece become U+FFFD.
        """
        return b"".join(self.piece_bytes(i, skip_control) for i in ids).decode("utf-8", "replace")

    def piece_bytes(self, i: int, skip_control: bool = True) -> bytes:
        """The UTF-8 bytes that one id stands for; they may be a part of a character."""
        if i in self.control_ids:
            return b"" if skip_control else self._pieces[i].encode("utf-8", "replace")
        known = self._bytes.get(i)
        if known is None:
            known = self._bytes[i] = self._find_bytes(i)
        return known

    def id(self, token: str) -> int:
        """The id of a piece or control token by its spelling in the file.

        Raises: CheckpointError if there is none.
        """
        if token not in self._ids:
            raise damaged(self._path, f"has no token {token!r}")
        return self._ids[token]

    def _find_bytes(self, i: int) -> bytes:
        piece = self._pieces.get(i)
        if piece is None:
            return "\ufffd".encode()
        if self._is_byte_level:
            values = [self._byte_of.get(character) for character in piece]
            return bytes(v for v in values if v is not None) if None not in values else piece.encode("utf-8", "replace")
        if piece in self._byte_of:
            return bytes([self._byte_of[piece]])
        return piece.replace(SPACE_MARK, " ").encode("utf-8", "replace")

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        pieces = byte_alphabet() if self._is_byte_level else [byte_piece(byte) for byte in range(256)]
        return {piece: byte for byte, piece in enumerate(pieces)}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _chunks(self, text: str) -> Iterator[str]:
        """The text in chunks; in SentencePiece a typed U+2581 stands alone, to be told from a space."""
        parts = [text] if self._is_byte_level else text.split(SPACE_MARK)
        for number, part in enumerate(parts):
            if number:
                yield SPACE_MARK
            yield from cut(part, self._cut_pattern)

    def _encode_batch(self, chunks: list[str]) -> list[int]:
        try:
            encodings = self._plain.encode_batch_fast(chunks, add_special_tokens=False)
        except BaseException as error:
            raise _refused(self._path, error) from None
        ids: list[int] = []
        for chunk, encoding in zip(chunks, encodings, strict=True):
            ids += self._mark_ids if chunk == SPACE_MARK and self._mark_ids else encoding.ids
        return ids

    def _check_wall(self) -> None:
        """Tries the two promises on the spelling of every control token.

        Raises: CheckpointError if a control token can be typed, or text is not given back.
        """
        text = " ".join(self._control).encode("utf-8", "replace").decode() + " \u2581 é中\U0001f600\n"
        ids = self.encode(text)
        reached = self.control_ids.intersection(ids)
        if reached:
            raise damaged(self._path, f"plain text reaches the control token {self._pieces[min(reached)]!r}")
        if self.decode(ids) != text:
            raise damaged(self._path, "does not give text back exactly")


def cut(text: str, pattern: re.Pattern[str]) -> Iterator[str]:
    """Cut text into chunks to encode one by one, at ends of matches; together they are the text."""
    start = 0
    while len(text) - start > CHUNK_CHARS:
        limit = start + MAX_CHUNK_CHARS
        safe = pattern.search(text, start + CHUNK_CHARS, limit)
        if safe is None and len(text) <= limit:
            break
        end = safe.end() if safe else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _safe_cuts(file: TokenizerFile) -> re.Pattern[str]:
    """Where text may be cut: no merge leads across a place that no piece crosses."""
    control = {token.id for token in file.control}
    marks = str.maketrans({"\u010a": "\n", "\u0120": " "} if file.is_byte_level else {SPACE_MARK: " "})
    pieces = [piece.translate(marks) for i, piece in file.pieces.items() if i not in control]
    places = [] if re.search(r"\n\S", " ".join(pieces)) else [_LINE_END]
    places += [] if re.search(r"\S ", "\n".join(pieces)) else [_WORD_END]
    return re.compile("|".join(places) or r"(?!)")


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start:,}",
            "Save the text as UTF-8.",
        ) from None


def _refused(path: Path, error: BaseException) -> CheckpointError | BaseException:
    """The error to raise for one of the library, whose panics are no Exception; Ctrl-C stays what it is."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return damaged(path, f"refused by the tokenizers library: {error}")
    return error
