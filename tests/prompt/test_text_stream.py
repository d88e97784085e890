"""Text that grows: whole characters only, stop strings cut exactly, whatever the token borders."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_metaspace_tokenizer, write_tokenizer

from salalocal.errors import RequestError
from salalocal.prompt.text_stream import TextStream
from salalocal.prompt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("pieces")
    write_metaspace_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def run(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.flush()]


def cut_at_stop(text: str, stop: list[str]) -> str:
    """The definition: read on character by character, until the text ends in a stop string; the longest is cut."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def test_unfinished_characters_wait(plain: Tokenizer) -> None:
    ids = plain.encode("é中\U0001f600a")
    assert len(ids) == 10
    assert run(TextStream(plain), ids) == ["", "é", "", "", "中", "", "", "", "\U0001f600", "a", ""]


def test_an_unfinished_character_at_the_end_shows(plain: Tokenizer) -> None:
    assert run(TextStream(plain), plain.encode("a中")[:-1]) == ["a", "", "", "\ufffd"]


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.integers(0, 421), max_size=30))
def test_any_ids_give_the_text_of_decode(plain: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(plain)
    assert "".join(run(stream, ids)) == plain.decode(ids)
    assert not stream.stopped


@settings(max_examples=500, deadline=None, database=None)
@given(
    st.text("ab\n中<", max_size=30),
    st.lists(st.text("ab\n中<", min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
)
def test_stop_strings_are_cut_exactly(plain: Tokenizer, text: str, stop: list[str], data: st.DataObject) -> None:
    border = data.draw(st.integers(0, len(text)))
    ids = plain.encode(text[:border]) + plain.encode(text[border:])
    stream = TextStream(plain, stop)
    shown = run(stream, ids)
    assert "".join(shown) == cut_at_stop(text, stop)
    assert stream.stopped == any(s in text for s in stop)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text("ab中", max_size=20), st.lists(st.text("ab中", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_held_longer_than_needed(plain: Tokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(plain, stop)
    shown = ""
    for number, character in enumerate(text, 1):
        for i in plain.encode(character):
            shown += stream.push(i)
        if stream.stopped:
            break
        held = text[len(shown) : number]
        assert text[:number] == shown + held
        assert not held or any(s.startswith(held) for s in stop)


def test_nothing_comes_after_a_stop_string(plain: Tokenizer) -> None:
    stream = TextStream(plain, ["\n\n"])
    assert "".join(stream.push(i) for i in plain.encode("one\n\ntwo\n\nthree")) == "one"
    assert stream.stopped and stream.flush() == ""


def test_a_false_start_of_a_stop_string_is_shown(plain: Tokenizer) -> None:
    stream = TextStream(plain, ["<end>"])
    assert "".join(run(stream, plain.encode("a <en> b <end"))) == "a <en> b <end"


def test_control_tokens_add_nothing(plain: Tokenizer) -> None:
    stream = TextStream(plain)
    ids = [plain.id("<|im_start|>"), *plain.encode("x"), plain.id("<unk>"), plain.id("<|im_end|>")]
    assert run(stream, ids) == ["", "x", "", "", ""]


def test_one_space_of_sentencepiece_goes_at_the_beginning(pieces: Tokenizer) -> None:
    for text, shown in ((" the  value ", "the  value "), ("the", "the"), ("  x", " x"), (" ", "")):
        assert "".join(run(TextStream(pieces), pieces.encode(text))) == shown
        assert "".join(run(TextStream(pieces, continues_text=True), pieces.encode(text))) == text


def test_byte_level_keeps_its_space(plain: Tokenizer) -> None:
    assert "".join(run(TextStream(plain), plain.encode(" x"))) == " x"


@pytest.mark.parametrize("stop", [[""], ["a", ""], "text", [1]])
def test_stop_must_be_texts(plain: Tokenizer, stop: list[str]) -> None:
    with pytest.raises(RequestError, match="stop"):
        TextStream(plain, stop)
