"""What a session says while it works: the same events for every face."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadProgress:
    """One prefill step is done; `path` is the document that is being read, or a part of the conversation.

    Units: all counts are tokens; `num_tokens` of `total_tokens` are in the state, `cached_tokens` of them were not
    read again; `elapsed_s` counts from the start of this read.
    """

    path: str
    document: int
    num_documents: int
    document_tokens: int
    document_total: int
    num_tokens: int
    total_tokens: int
    cached_tokens: int
    elapsed_s: float
    is_paused: bool = False

    @property
    def document_left(self) -> int:
        """Tokens of this document that are still to be read."""
        return self.document_total - self.document_tokens

    @property
    def new_tokens(self) -> int:
        """Tokens read so far in this read."""
        return self.num_tokens - self.cached_tokens

    @property
    def tokens_per_s(self) -> float:
        """Mean rate of this read."""
        return self.new_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer; `text` may be empty while the bytes of a character or a stop string are incomplete."""

    text: str
    token_ids: tuple[int, ...]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ThinkingDelta:
    """A piece of what the model thinks aloud before it answers."""

    text: str
    token_ids: tuple[int, ...]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Usage:
    """What a turn cost. Units: tokens, seconds, bytes; `context_tokens` = `cached_tokens` + `new_tokens`.

    `right_guesses`: tokens of the answer that were guessed ahead, see `engine.prompt_lookup`.
    """

    context_tokens: int
    cached_tokens: int
    answer_tokens: int
    thinking_tokens: int
    read_s: float
    answer_s: float
    peak_memory_bytes: int
    right_guesses: int = 0

    @property
    def new_tokens(self) -> int:
        """Tokens of the context that were read in this turn."""
        return self.context_tokens - self.cached_tokens

    @property
    def tokens_per_s(self) -> float:
        """Answer and thinking tokens a second."""
        return self.answer_tokens / self.answer_s if self.answer_s > 0 else 0.0


@dataclass(frozen=True)
class Finish:
    """The end of a turn; reason: stop, length, repetition or cancelled."""

    reason: str
    usage: Usage


Event = ReadProgress | TextDelta | ThinkingDelta | Finish
