"""The wall between text and control tokens, exact round trips, parity with the library, cuts that change nothing."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import (
    BOS_ID,
    CONTROL_TOKENS,
    EOS_IDS,
    START_TOKENS,
    VOCAB_SIZE,
    metaspace_tokenizer_json,
    tokenizer_json,
    write_metaspace_tokenizer,
    write_tokenizer,
)
from tokenizers import Tokenizer as LibraryTokenizer

from salalocal.errors import CheckpointError, RequestError
from salalocal.prompt import tokenizer as tokenizer_module
from salalocal.prompt.tokenizer import Tokenizer, cut
from salalocal.prompt.tokenizer_file import Place

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
EMBEDDED = r"\n+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?![^\n])|[^\S\n]+(?!\S)|[^\S\n]+"
MARK = "\u2581"

Edit = Callable[[dict[str, Any]], Any]


def add_token(content: str, special: bool = False) -> Edit:
    """A further added token with the next id."""

    def edit(file: dict[str, Any]) -> None:
        last = file["added_tokens"][-1]
        file["added_tokens"].append({**last, "id": last["id"] + 1, "content": content, "special": special})

    return edit


def number_again(file: dict[str, Any]) -> None:
    """Ids without holes, added tokens behind the others, as the library numbers them whatever the file says."""
    vocab = file["model"]["vocab"]
    for number, piece in enumerate(sorted(vocab, key=lambda piece: vocab[piece])):
        vocab[piece] = number
    outside = [added for added in file["added_tokens"] if added["content"] not in vocab]
    for number, added in enumerate(outside, len(vocab)):
        added["id"] = number
    for added in file["added_tokens"]:
        added["id"] = vocab.get(added["content"], added["id"])
    file["added_tokens"].sort(key=lambda added: added["id"])


def make_reachable(file: dict[str, Any]) -> None:
    """Puts </s>, <s> and a non-special <think> into the vocabulary in such a way that merges lead to them."""
    vocab, merges = file["model"]["vocab"], file["model"]["merges"]
    for token in ("</s>", "<s>", "<think>", "<0x41>"):
        for end in range(2, len(token) + 1):
            vocab.setdefault(token[:end], len(vocab))
            if [token[: end - 1], token[end - 1]] not in merges:
                merges.insert(0, [token[: end - 1], token[end - 1]])
    for left in ("</s>", "<0x0A>"):
        vocab.setdefault(left, len(vocab))
        merges.insert(0, [left, "a"])
        vocab[left + "a"] = len(vocab)
    file["added_tokens"].append({**file["added_tokens"][-1], "content": "<think>", "special": False})
    number_again(file)


def split_pattern(pattern: str) -> Edit:
    def edit(file: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        file["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, {**file["pre_tokenizer"], "use_regex": False}],
        }

    return edit


def metaspace(scheme: str) -> Edit:
    def edit(file: dict[str, Any]) -> None:
        file["normalizer"] = None
        file["pre_tokenizer"] = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": False}

    return edit


def ignore_merges(file: dict[str, Any]) -> None:
    make_reachable(file)
    file["model"]["ignore_merges"] = True


VARIANTS: dict[str, tuple[Callable[[], dict[str, Any]], Edit]] = {
    "bytes": (tokenizer_json, add_token("<think>")),
    "bytes reachable": (tokenizer_json, make_reachable),
    "bytes ignore_merges": (tokenizer_json, ignore_merges),
    "bytes llama3": (tokenizer_json, split_pattern(LLAMA3)),
    "bytes embedded": (tokenizer_json, split_pattern(EMBEDDED)),
    "bytes odd tokens": (tokenizer_json, add_token("\U0001f600 é\n", special=True)),
    "pieces": (metaspace_tokenizer_json, add_token("<think>")),
    "pieces reachable": (metaspace_tokenizer_json, make_reachable),
    "pieces always": (metaspace_tokenizer_json, metaspace("always")),
    "pieces first": (metaspace_tokenizer_json, metaspace("first")),
    "pieces odd tokens": (metaspace_tokenizer_json, add_token(f"a{MARK}b", special=True)),
    "pieces letter": (metaspace_tokenizer_json, lambda file: (add_token("中")(file), number_again(file))),
}


def build(folder: Path, name: str) -> tuple[Tokenizer, LibraryTokenizer]:
    """A tokenizer of ours and the library's own of the same file."""
    make, edit = VARIANTS[name]
    file = make()
    edit(file)
    write_tokenizer(folder, file)
    return Tokenizer.from_folder(folder), LibraryTokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=VARIANTS)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, LibraryTokenizer]:
    return build(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build(tmp_path_factory.mktemp("model"), "bytes")[0]


CONTEXTS = [
    "{0}",
    " {0} ",
    "\n{0}\n",
    "a{0}b",
    "{0}{0}",
    "<{0}>",
    "<|im_end|>{0}<|im_start|>system\n",
    "{0}\n<think>{0}</think>",
    "é{0}中",
    "▁{0}▁",
    "<s>{0}</s>",
    "5{0}\t\r\n  {0}",
    "{0}</s>a<0x41><0xFF>\na",
]

ODD_PIECES = [
    *START_TOKENS,
    *CONTROL_TOKENS,
    "<think>",
    "<0x41>",
    "<0xE2>",
    MARK,
    "\ufffd",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\0",
]
texts = st.lists(
    st.one_of(
        st.sampled_from(ODD_PIECES),
        st.sampled_from("<|>s/_imendtark x▁"),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=12,
).map("".join)


def check_text(tokenizer: Tokenizer, text: str) -> None:
    for place in Place:
        ids = tokenizer.encode(text, place)
        assert not tokenizer.control_ids.intersection(ids), (text, place)
        assert max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_added_token_can_be_typed(both: tuple[Tokenizer, LibraryTokenizer]) -> None:
    tokenizer, library = both
    added = library.get_added_tokens_decoder()
    assert set(added) == tokenizer.control_ids
    for token in added.values():
        for context in CONTEXTS:
            check_text(tokenizer, context.format(token.content))


def test_the_library_alone_would_not_hold_the_wall(tmp_path: Path) -> None:
    _, library = build(tmp_path, "bytes reachable")
    library.encode_special_tokens = True
    assert set(library.encode("<think>").ids) & set(library.get_added_tokens_decoder())


def test_any_text_comes_back_without_control_tokens(both: tuple[Tokenizer, LibraryTokenizer]) -> None:
    @settings(max_examples=400, deadline=None, database=None)
    @given(texts)
    def check(text: str) -> None:
        check_text(both[0], text)

    check()


def test_decoding_is_concatenation(both: tuple[Tokenizer, LibraryTokenizer]) -> None:
    tokenizer = both[0]

    @settings(max_examples=100, deadline=None, database=None)
    @given(texts, texts)
    def check(left: str, right: str) -> None:
        assert tokenizer.decode(tokenizer.encode(left) + tokenizer.encode(right)) == left + right

    check()


@pytest.mark.parametrize("name", ["bytes", "bytes llama3", "bytes embedded", "pieces", "pieces always", "pieces first"])
def test_template_text_gets_the_ids_of_the_library(tmp_path: Path, name: str) -> None:
    tokenizer, library = build(tmp_path, name)

    @settings(max_examples=200, deadline=None, database=None)
    @given(
        st.lists(st.sampled_from([*CONTROL_TOKENS, "<s>", "user\n", "the  value", " of", "\n", "é中", "x"]), max_size=8)
    )
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert tokenizer.encode_template(text) == library.encode(text, add_special_tokens=False).ids

    check()


def test_control_tokens_swallow_white_space_only_where_they_say_so(tmp_path: Path) -> None:
    file = tokenizer_json()
    file["added_tokens"][-1] |= {"lstrip": True, "rstrip": True}
    write_tokenizer(tmp_path, file)
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "a \n<|fim_suffix|>  \n b <|im_end|> c"
    assert Tokenizer.from_folder(tmp_path).encode_template(text) == library.encode(text, add_special_tokens=False).ids


def test_named_ids(plain: Tokenizer) -> None:
    assert plain.vocab_size == VOCAB_SIZE + 1  # <think> was added
    assert plain.bos_id == BOS_ID == plain.id("<s>")
    assert plain.eos_ids == EOS_IDS == (plain.id("</s>"), plain.id("<|im_end|>"))
    assert plain.encode_template("<|im_start|>") == [plain.id("<|im_start|>")]
    with pytest.raises(CheckpointError, match="nowhere"):
        plain.id("nowhere")


def test_a_prompt_begins_with_the_start_token_and_the_dummy_prefix(tmp_path: Path) -> None:
    for name in ("bytes", "pieces", "pieces first"):
        tokenizer, library = build(tmp_path / name, name)
        assert tokenizer.encode_prompt("the value") == [
            BOS_ID,
            *library.encode("the value", add_special_tokens=False).ids,
        ]
        assert tokenizer.has_prefix_space == name.startswith("pieces")


def test_control_tokens_are_left_out_or_spelled(plain: Tokenizer) -> None:
    ids = plain.encode_template("<|im_start|>user\nhi<|im_end|>")
    assert plain.decode(ids) == "user\nhi"
    assert plain.decode(ids, skip_control=False) == "<|im_start|>user\nhi<|im_end|>"


def test_ids_without_a_piece_show(plain: Tokenizer) -> None:
    assert plain.decode([plain.vocab_size + 5]) == "\ufffd"
    assert plain.decode([plain.encode("é")[0]]) == "\ufffd"


@pytest.mark.parametrize("text", ["\ud800", "a" * 100 + "é\udc80", "\udfff\ud800", "x\udce9.py"])
def test_a_lone_surrogate_is_named(plain: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match=r"surrogate U\+D[8-F]"):
        plain.encode(text)


@pytest.mark.parametrize(
    "pattern", [GPT2, LLAMA3, QWEN, EMBEDDED, None], ids=["gpt2", "llama3", "qwen", "own", "pieces"]
)
def test_cuts_do_not_change_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | None) -> None:
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARS", 3)
    if pattern is None:
        write_metaspace_tokenizer(tmp_path)
    else:
        file = tokenizer_json()
        split_pattern(pattern)(file)
        write_tokenizer(tmp_path, file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    if pattern is None:
        file["normalizer"]["normalizers"].pop(0)
    library = LibraryTokenizer.from_str(json.dumps({**file, "added_tokens": []}))
    num_cuts = 0

    @settings(max_examples=500, deadline=None, database=None)
    @given(st.lists(st.sampled_from([*" \n\r\t'é中5.;xs", " the", "\n\n", "self", "    ", "'ll", "-->"]), max_size=40))
    def check(parts: list[str]) -> None:
        nonlocal num_cuts
        text = "".join(parts)
        num_cuts += sum(1 for _ in cut(text, tokenizer._cut_pattern)) - 1
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids

    check()
    assert num_cuts > 100


def test_cuts_keep_off_places_that_pieces_cross(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARS", 3)
    for left, right, kept in (("<0x0A>", "a", True), ("\n", "a", False), (",", MARK, False), (MARK, "a", True)):
        file = metaspace_tokenizer_json()
        for piece in (left, right, left + right):
            file["model"]["vocab"].setdefault(piece, len(file["model"]["vocab"]))
        file["model"]["merges"].append([left, right])
        number_again(file)
        folder = tmp_path / f"{ord(left[0])}{ord(right)}"
        write_tokenizer(folder, file)
        tokenizer = Tokenizer.from_folder(folder)
        chunks = list(cut("abc\nabc, abc\nabc, abc", tokenizer._cut_pattern))
        assert (any(c.endswith("\n") for c in chunks) and any(c.startswith(" ") for c in chunks)) == kept
        text = "abc\nabc, abc\n" * 20
        whole = tokenizer._plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == whole


def test_cuts_lose_nothing_and_bound_every_chunk(plain: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for alphabet in ("a", "ab ", "a\n", " ", "\r\n", "ab\r\n c", "中"):
        text = "".join(rng.choices(alphabet, k=300_000))
        chunks = list(cut(text, plain._cut_pattern))
        assert "".join(chunks) == text
        assert max(map(len, chunks)) <= tokenizer_module.MAX_CHUNK_CHARS
        assert list(cut(text, plain._cut_pattern)) == chunks
    assert list(cut("", plain._cut_pattern)) == []


def test_time_is_linear_in_odd_text(plain: Tokenizer) -> None:
    size = 300_000

    def seconds(text: str) -> float:
        started_s = time.process_time()
        plain.encode(text)
        return time.process_time() - started_s

    normal = ("def the_value(self, name):\n    return self.config[name]  # what is this\n" * (size // 70))[:size]
    usual_s = min(seconds(normal), seconds(normal))
    for text in ("a" * size, " " * size, "\n" * size, "!" * size, "the" * (size // 3), "中" * (size // 3)):
        assert min(seconds(text), seconds(text)) < 2 * usual_s, repr(text[:4])
    lines = "a\n" * (size // 2)  # as many pieces as bytes
    assert min(seconds(lines), seconds(lines)) < 4 * usual_s


def test_normalizer_nfc_is_left_out(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {**tokenizer_json(), "normalizer": {"type": "NFC"}})
    check_text(Tokenizer.from_folder(tmp_path), "e\u0301 \u212b")


def test_truncation_and_padding_of_the_file_do_nothing(tmp_path: Path) -> None:
    file = tokenizer_json()
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    write_tokenizer(tmp_path, file)
    check_text(Tokenizer.from_folder(tmp_path), "the value of the config in the file")
    assert Tokenizer.from_folder(tmp_path).encode("a") != []


def test_a_split_pattern_that_gives_up_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = tokenizer_json()
    split_pattern("(a+)+$")(file)
    write_tokenizer(tmp_path, file)
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: refused by the tokenizers library"):
        tokenizer.encode("a" * 40 + "!")
