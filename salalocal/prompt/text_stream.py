"""Token ids to text while they are made: ids come in one by one, pieces of text go out; for the session."""

import codecs
from collections.abc import Sequence

from salalocal.errors import RequestError
from salalocal.prompt.tokenizer import Tokenizer


class TextStream:
    """The text of a growing answer, piece by piece; the pieces together are the answer up to the first stop string.

    Held back: bytes that are not a whole character yet, and an end that may become a stop string. A stop string counts
    as soon as it is complete (of several that end together the longest), whatever the token borders; it is cut off.

    With a SentencePiece tokenizer one space at the very beginning is dropped, as upstream decoders do; with
    `continues_text` it is kept, for text that goes on where a prompt ended.

    Raises: RequestError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continues_text: bool = False) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError("stop: should be a list of texts, none of them empty")
        self._tokenizer = tokenizer
        self._stop = tuple(dict.fromkeys(stop))
        self._max_held = max(map(len, self._stop), default=1) - 1
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._drops_space = tokenizer.has_prefix_space and not continues_text
        self.stopped = False

    def push(self, i: int) -> str:
        """The text that is certain after one more id, often empty; nothing comes after a stop string."""
        return self._advance(self._decoder.decode(self._tokenizer.piece_bytes(i)))

    def flush(self) -> str:
        """What was held back, when no more ids come; an unfinished character is U+FFFD."""
        text = self._advance(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        if self._drops_space:
            text = text.removeprefix(" ")
            self._drops_space = False
        self._held += text
        end = self._find_stop()
        if end is None:
            end = len(self._held) - self._num_held()
            text, self._held = self._held[:end], self._held[end:]
            return text
        self.stopped = True
        text, self._held = self._held[:end], ""
        return text

    def _find_stop(self) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_held(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._max_held, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
