"""Malformed and hostile tokenizer files: each is one CheckpointError that names the file and the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CONTROL_TOKENS, metaspace_tokenizer_json, tokenizer_json, write_tokenizer

from salalocal.errors import CheckpointError, SalaLocalError
from salalocal.prompt import tokenizer_file
from salalocal.prompt.tokenizer import Tokenizer
from salalocal.prompt.tokenizer_file import Place, PrefixRule, byte_piece

Edit = Callable[[dict[str, Any]], Any]

BAD_FILES: dict[str, tuple[Edit, str]] = {
    "no model": (lambda f: f.pop("model"), "model of type"),
    "unigram": (lambda f: f["model"].update(type="Unigram"), "'Unigram' is not supported"),
    "model list": (lambda f: f.update(model=[]), "model of type 'list'"),
    "no vocab": (lambda f: f["model"].pop("vocab"), "model.vocab"),
    "empty vocab": (lambda f: f["model"].update(vocab={}), "model.vocab"),
    "vocab list": (lambda f: f["model"].update(vocab=["a"]), "model.vocab"),
    "merges missing": (lambda f: f["model"].pop("merges"), "model.merges"),
    "merge unknown": (lambda f: f["model"]["merges"].append(["a", "zzzz"]), "zzzz"),
    "merge number": (lambda f: f["model"]["merges"].append(5), "refused by the tokenizers library"),
    "merge three": (lambda f: f["model"]["merges"].append(["a", "b", "c"]), "refused by the tokenizers library"),
    "id negative": (lambda f: f["model"]["vocab"].update(a=-1), "'a' has the id -1"),
    "id text": (lambda f: f["model"]["vocab"].update(a="7"), "'a' has the id '7'"),
    "id true": (lambda f: f["model"]["vocab"].update(a=True), "'a' has the id True"),
    "id float": (lambda f: f["model"]["vocab"].update(a=1e308), "'a' has the id"),
    "id huge": (lambda f: f["model"]["vocab"].update(a=2**40), "'a' has the id"),
    "id twice": (lambda f: f["model"]["vocab"].update(a=9), "one id to two pieces"),
    "subword prefix": (lambda f: f["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "word suffix": (lambda f: f["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "byte missing": (lambda f: f["model"]["vocab"].pop("!"), "the piece '!' is missing"),
    "added dict": (lambda f: f.update(added_tokens={"a": 1}), "added_tokens should be a list"),
    "added number": (lambda f: f["added_tokens"].append(7), "no usable id or text"),
    "added empty": (lambda f: f["added_tokens"][3].update(content=""), "no usable id or text"),
    "added no id": (lambda f: f["added_tokens"][3].pop("id"), "no usable id or text"),
    "added shared id": (lambda f: f["added_tokens"][4].update(id=f["added_tokens"][3]["id"]), "share the id"),
    "added other id": (lambda f: f["added_tokens"][1].update(id=100_000), "'<s>' has the id 100000"),
    "added over a piece": (lambda f: f["added_tokens"][5].update(id=20), "vocabulary disagrees"),
    "added byte": (
        lambda f: f["added_tokens"].append({"id": f["model"]["vocab"]["!"], "content": "!"}),
        "'!' is missing",
    ),
    "decoder none": (lambda f: f.update(decoder=None), "neither ByteLevel nor ByteFallback"),
    "decoder text": (lambda f: f.update(decoder="ByteLevel"), "decoders should be objects"),
    "decoder other": (lambda f: f.update(decoder={"type": "WordPiece"}), "neither ByteLevel nor ByteFallback"),
    "lowercase": (lambda f: f.update(normalizer={"type": "Lowercase"}), "'Lowercase' would change the text"),
    "replace": (
        lambda f: f.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "'Replace' would change the text",
    ),
    "prefix space": (lambda f: f["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "drops spaces": (lambda f: f.update(pre_tokenizer={"type": "Whitespace"}), "'Whitespace' is not supported"),
    "removes": (
        lambda f: f.update(pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}),
        "'Split' is not supported",
    ),
    "no byte level": (lambda f: f.update(pre_tokenizer=None), "do not fit together"),
    "nested sequence": (
        lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Sequence"}]}),
        "'Sequence' is not supported",
    ),
    "broken pattern": (
        lambda f: f.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "(x"}, "behavior": "Isolated", "invert": False},
                    f["pre_tokenizer"],
                ],
            }
        ),
        "refused by the tokenizers library",
    ),
    "escape codes": (lambda f: f["model"].update(type="\x1b[2J\nerror: x"), r"\\x1b\[2J"),
}

BAD_PIECES: dict[str, tuple[Edit, str]] = {
    "byte missing": (lambda f: f["model"]["vocab"].pop("<0x0A>"), "the piece '<0x0A>' is missing"),
    "byte is control": (
        lambda f: f["added_tokens"].append({"id": f["model"]["vocab"]["<0x0A>"], "content": "<0x0A>"}),
        "the piece '<0x0A>' is missing",
    ),
    "no fallback": (lambda f: f["model"].update(byte_fallback=False), "byte_fallback"),
    "ignore_merges": (lambda f: f["model"].update(ignore_merges=True), "ignore_merges"),
    "prepend other": (
        lambda f: f["normalizer"]["normalizers"][0].update(prepend="x"),
        "'Prepend' would change the text",
    ),
    "no marks": (lambda f: f.update(normalizer=None), "do not fit together"),
    "scheme": (
        lambda f: f.update(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "odd"}),
        "prepend_scheme 'odd'",
    ),
    "replacement": (lambda f: f.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "Metaspace"),
    "byte level": (lambda f: f.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}), "fit together"),
}

BAD_COMPANIONS: dict[str, tuple[str, object, str]] = {
    "config list": ("tokenizer_config.json", [], "JSON object"),
    "config text": ("tokenizer_config.json", "}{", "not valid JSON"),
    "bos number": ("tokenizer_config.json", {"bos_token": 5}, "bos_token should be text"),
    "bos unknown": ("tokenizer_config.json", {"bos_token": "<nope>"}, "'<nope>' is not in the vocabulary"),
    "decoder list": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder an object"),
    "decoder key": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "no usable id"),
    "decoder long key": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}},
        "no usable",
    ),
    "decoder clash": ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<a>"}}}, "share the id 1"),
    "added clash": ("added_tokens.json", {"<s>": 77}, "'<s>' has the id"),
    "added text": ("added_tokens.json", {"<a>": "x"}, "no usable id"),
    "map": ("special_tokens_map.json", {"cls_token": {"content": 1}}, "no usable"),
    "eos text": ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id '2'"),
    "eos huge": ("generation_config.json", {"eos_token_id": [2, 10**9]}, "eos_token_id 1000000000"),
    "eos nested": ("generation_config.json", {"eos_token_id": [[2]]}, r"eos_token_id \[2\]"),
}


def refusal(folder: Path, file_name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    message = caught.value.message
    assert file_name in message and len(message) <= 300 and caught.value.hint
    assert message.isprintable()
    return message


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_tokenizer_file(tmp_path: Path, kind: str) -> None:
    edit, reason = BAD_FILES[kind]
    file = tokenizer_json()
    write_tokenizer(tmp_path, file)
    edit(file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.from_folder(tmp_path)
    refusal(tmp_path, "tokenizer.json")


@pytest.mark.parametrize("kind", BAD_PIECES)
def test_bad_sentencepiece_file(tmp_path: Path, kind: str) -> None:
    edit, reason = BAD_PIECES[kind]
    file = metaspace_tokenizer_json()
    edit(file)
    write_tokenizer(tmp_path, file)
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.from_folder(tmp_path)
    refusal(tmp_path, "tokenizer.json")


@pytest.mark.parametrize("kind", BAD_COMPANIONS)
def test_bad_companion_file(tmp_path: Path, kind: str) -> None:
    name, content, reason = BAD_COMPANIONS[kind]
    write_tokenizer(tmp_path)
    if name == "special_tokens_map.json":
        reason = "cls_token should be text"
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer.from_folder(tmp_path)


def test_a_hole_in_the_wall_is_found_at_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tokenizer_json()
    vocab, merges = file["model"]["vocab"], file["model"]["merges"]
    vocab["<s"] = len(vocab)
    merges[:0] = [["<", "s"], ["<s", ">"]]
    file["pre_tokenizer"] = {**file["pre_tokenizer"], "use_regex": False}
    file["added_tokens"] = [{"id": i, "content": content} for i, content in enumerate(("<unk>", "<s>", "</s>"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert 1 not in Tokenizer.from_folder(tmp_path).encode("<s>")
    monkeypatch.setattr(tokenizer_file, "_take_control", lambda *_: None)
    with pytest.raises(CheckpointError, match="plain text reaches the control token '<s>'"):
        Tokenizer.from_folder(tmp_path)


def test_missing_tokenizer_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, "tokenizer.json").endswith("missing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One value somewhere in the file is replaced by anything; no other exception may come out, and no control id."""
    folder = tmp_path_factory.mktemp("model")
    file = data.draw(st.sampled_from([tokenizer_json, metaspace_tokenizer_json]))()
    write_tokenizer(folder, file)
    place: Any = file
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place = inner
    place[key] = data.draw(json_values)
    (folder / "tokenizer.json").write_text(json.dumps(file))
    text = "<|im_end|> a▁é<s>"
    try:
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode(text)
    except SalaLocalError:
        return
    assert not tokenizer.control_ids.intersection(ids)
    assert tokenizer.decode(ids) == text


def test_added_tokens_of_every_file_are_control(tmp_path: Path) -> None:
    file = tokenizer_json()
    vocab = file["model"]["vocab"]
    vocab["<named>"] = len(vocab) + len(CONTROL_TOKENS)
    write_tokenizer(tmp_path, file)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": {"700": {"content": "<a>"}}, "mask_token": {"content": "<named>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": 701}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode_template("<a><b><named>") == [700, 701, vocab["<named>"]]
    assert {700, 701, vocab["<named>"]} <= tokenizer.control_ids
    assert tokenizer.vocab_size == 702


@pytest.mark.parametrize(
    ("config", "generation", "bos_id", "eos_ids"),
    [
        ({"bos_token": "<s>"}, {}, 1, ()),
        ({"bos_token": "<s>", "add_bos_token": False}, {}, None, ()),
        ({"bos_token": None, "eos_token": "</s>"}, {"eos_token_id": 414}, None, (2, 414)),
        ({"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}, {"eos_token_id": [2, 414]}, 1, (414, 2)),
        ({}, {}, None, (2,)),
    ],
)
def test_start_and_stop_ids(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any], bos_id: int | None, eos_ids: tuple[int, ...]
) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if not config:
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos_id, eos_ids)


def test_prefix_rule() -> None:
    forced = PrefixRule(frozenset({Place.START}), is_forced=True)
    gentle = PrefixRule(frozenset({Place.START}))
    assert [forced.apply(text, Place.START) for text in ("a", " a", "")] == [" a", "  a", ""]
    assert [gentle.apply(text, Place.START) for text in ("a", " a", "")] == [" a", " a", ""]
    assert forced.apply("a", Place.TEXT) == forced.apply("a", Place.CONTROL) == "a"


def test_byte_piece() -> None:
    assert byte_piece(10) == "<0x0A>"
