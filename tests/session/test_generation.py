"""Tokens become text, whatever ends them."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from tiny_model import with_stop_token

from salalocal.engine.fused.decoder import GuessStats
from salalocal.prompt.text_stream import TextStream
from salalocal.session.generation import Generation, ids_of_text
from salalocal.session.runtime import Runtime


class ScriptedTokens:
    """Stands for the engine's generation: gives back tokens, then ends for a reason."""

    def __init__(self, ids: Sequence[int], reason: str) -> None:
        self._left, self._end = list(ids), reason
        self.reason: str | None = None
        self.guesses = GuessStats()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def __next__(self) -> int:
        if not self._left:
            self.reason = self._end
            raise StopIteration
        token = self._left.pop(0)
        if not self._left and self._end != "cancelled":
            self.reason = self._end
        return token


def start(runtime: Runtime, ids: Sequence[int], reason: str, stop: Sequence[str] = ()) -> Generation:
    tokens = cast(Any, ScriptedTokens(ids, reason))
    return Generation(tokens, TextStream(runtime.tokenizer, stop, continues_text=True), {2})


@pytest.mark.parametrize("reason", ["length", "repetition", "cancelled"])
def test_every_token_counts_when_no_stop_token_ends_it(runtime: Runtime, reason: str) -> None:
    ids = runtime.tokenizer.encode("naïve 中 value")
    generation = start(runtime, ids, reason)
    assert "".join(map(str, generation)) == generation.text == "naïve 中 value"
    assert generation.token_ids == ids and generation.finish == reason


def test_the_stop_token_is_no_part_of_it(runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("value")
    generation = start(runtime, [*ids, 2], "stop")
    assert list(map(str, generation))[-1:] != [] and generation.text == "value"
    assert generation.token_ids == ids and generation.finish == "stop"


def test_unfinished_characters_come_with_the_end(runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("a中")
    generation = start(runtime, ids[:-1], "length")
    assert "".join(map(str, generation)) == "a\ufffd" == generation.text


def test_a_stop_string_cuts_the_text_but_not_the_tokens(runtime: Runtime) -> None:
    ids = runtime.tokenizer.encode("one two three")
    generation = start(runtime, ids, "length", [" th"])
    deltas = list(generation)
    assert generation.text == "one two" and generation.finish == "stop"
    assert [token for delta in deltas for token in delta.token_ids] == generation.token_ids
    assert ids[: len(generation.token_ids)] == generation.token_ids
    assert generation.is_cut and cast(Any, generation)._tokens.is_closed, "its graph would stay"


@pytest.mark.parametrize("cut", range(19))
def test_ids_of_a_cut_text_are_those_before_the_cut(runtime: Runtime, cut: int) -> None:
    tokenizer, whole = runtime.tokenizer, "naïve = 中國;\n  end"
    ids, text = tokenizer.encode(whole), whole[:cut]
    kept = ids_of_text(ids, text, tokenizer)
    assert tokenizer.decode(kept) == text
    shared = next((i for i, pair in enumerate(zip(kept, ids, strict=False)) if pair[0] != pair[1]), len(kept))
    assert len(kept) - shared <= 8, "more than the token at the cut was encoded anew"
    assert ids_of_text([ids[0], 0], "other", tokenizer) == tokenizer.encode("other")


def test_ids_of_a_cut_text_keep_the_space_that_a_tokenizer_puts_in_front() -> None:
    class Spaced:
        has_prefix_space = True
        pieces = (b" one", b" two", b" three")

        def piece_bytes(self, i: int) -> bytes:
            return self.pieces[i]

        def encode(self, text: str, place: object) -> list[int]:
            return [100 + len(text)]

    assert ids_of_text([0, 1, 2], "one two", cast(Any, Spaced())) == [0, 1]
    assert ids_of_text([0, 1, 2], "one tw", cast(Any, Spaced())) == [0, 103]


def test_stopping_from_outside_keeps_what_was_drawn(runtime: Runtime) -> None:
    generation = start(runtime, runtime.tokenizer.encode("one two"), "length", ["onward"])
    assert str(next(generation)) != ""
    generation.stop_here()
    assert generation.finish == "cancelled"
    generation.stop_here()
    assert runtime.tokenizer.decode(generation.token_ids) == generation.text


def test_with_the_real_engine(runtime: Runtime) -> None:
    first = runtime.generate("x", max_tokens=6)
    list(first)
    stopped = with_stop_token(runtime, first.token_ids[-1]).generate("x", max_tokens=6)
    list(stopped)
    assert stopped.finish == "stop" and first.token_ids[-1] not in stopped.token_ids
