"""tokenizer.json and its companions: a model folder comes in, a TokenizerFile goes out; for Tokenizer.

What is kept is a tokenizer for plain text, which has no way to a control token, and beside it the table of all
pieces. Supported are the two kinds of byte-complete BPE: byte-level (GPT-2, Llama 3, Qwen, the embedded model) and
SentencePiece with byte fallback (Llama 2, MiniCPM-SALA 9B). Anything that would lose text is refused by name.

    Control tokens   every added token, special or not, of tokenizer.json, added_tokens.json and
                     tokenizer_config.json, and the named ones (bos_token, ...). They are taken out of the plain
                     vocabulary, and with them each merge that yields or uses one.
    Normalizers      none but the space marks of SentencePiece; NFC is left out, because text is never rewritten (ids
                     differ from upstream for text that is not NFC, and for no other).
    Dummy prefix     taken out of the plain tokenizer and kept as a PrefixRule, so that text cut into segments does
                     not gain a space at each cut.
    Truncation, padding, dropout and the post-processor are left out: nothing is cut, filled or added.
"""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from salalocal.prompt.model_folder import damaged, read_json

MAX_TOKENIZER_BYTES = 32 * 2**20
MAX_CONFIG_BYTES = 8 * 2**20
MAX_VOCAB = 4_000_000
MAX_ADDED_TOKENS = 100_000
SPACE_MARK = "\u2581"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Place(Enum):
    """Where a piece of text begins: at the start of the prompt, right behind a control token, or inside text."""

    START = "start"
    CONTROL = "control"
    TEXT = "text"


@dataclass(frozen=True)
class PrefixRule:
    """Where a SentencePiece tokenizer puts a space before text; `is_forced`: also before text that begins with one."""

    places: frozenset[Place] = frozenset()
    is_forced: bool = False

    def apply(self, text: str, place: Place) -> str:
        """The text as it is encoded at this place."""
        if place not in self.places or not text or (text.startswith(" ") and not self.is_forced):
            return text
        return " " + text


@dataclass(frozen=True)
class ControlToken:
    """An added token; the flags say whether it swallows the white space beside it in template text."""

    id: int
    content: str
    strips_left: bool = False
    strips_right: bool = False


@dataclass(frozen=True)
class TokenizerFile:
    """A checked tokenizer: `plain_json` for the `tokenizers` library, `pieces` by id, the control tokens."""

    path: Path
    plain_json: str
    pieces: dict[int, str]
    control: tuple[ControlToken, ...]
    is_byte_level: bool
    prefix_rule: PrefixRule
    named_tokens: dict[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]


def read_tokenizer_file(folder: Path) -> TokenizerFile:
    """Read and check the tokenizer of a model folder.

    Raises: CheckpointError, naming the file and the reason.
    """
    path = folder / "tokenizer.json"
    content = read_json(path, MAX_TOKENIZER_BYTES)
    if content is None:
        raise damaged(path, "missing")
    config = read_json(folder / "tokenizer_config.json", MAX_CONFIG_BYTES) or {}
    special_map = read_json(folder / "special_tokens_map.json", MAX_CONFIG_BYTES) or {}
    added_map = read_json(folder / "added_tokens.json", MAX_CONFIG_BYTES) or {}
    model = _checked_model(path, content.get("model"))
    vocab: dict[str, int] = model["vocab"]
    named = _named_tokens(folder, config, special_map)
    control = _control_tokens(path, content, vocab, added_map, config, named)
    is_byte_level = _is_byte_level(path, content.get("decoder"))
    prefix_rule = _take_prefix(path, content, is_byte_level)
    pieces = {i: piece for piece, i in vocab.items()} | {token.id: token.content for token in control}
    _take_control(model, {token.content for token in control}, is_byte_level)
    _check_bytes(path, model, is_byte_level)
    content |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None, "decoder": None}
    ids = {token.content: token.id for token in control}
    bos_id, eos_ids = _start_and_stop(folder, config, named, ids, max(pieces) + 1)
    return TokenizerFile(path, json.dumps(content), pieces, control, is_byte_level, prefix_rule, named, bos_id, eos_ids)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary. Source: GPT-2, encoder.py."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def byte_piece(byte: int) -> str:
    """The piece that stands for a byte in a SentencePiece vocabulary."""
    return f"<0x{byte:02X}>"


def _checked_model(path: Path, model: Any) -> dict[str, Any]:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else type(model).__name__
        raise damaged(path, f"model of type {kind!r} is not supported, only BPE is")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise damaged(path, f"model.{name} = {model[name]!r} is not supported")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab or not isinstance(merges, list):
        raise damaged(path, "model.vocab should be an object and model.merges a list")
    for piece, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_VOCAB:
            raise damaged(path, f"model.vocab: {piece!r} has the id {i!r}, not in 0..{MAX_VOCAB - 1}")
    if len(set(vocab.values())) != len(vocab):
        raise damaged(path, "model.vocab gives one id to two pieces")
    model["dropout"] = None
    return model


def _named_tokens(folder: Path, config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; tokenizer_config.json goes before special_tokens_map.json."""
    named = {}
    for name in NAMED_TOKENS:
        source = "tokenizer_config.json" if name in config else "special_tokens_map.json"
        value = config.get(name, special_map.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise damaged(folder / source, f"{name} should be text, is {value!r}")
        named[name] = value
    return named


def _control_tokens(
    path: Path,
    content: dict[str, Any],
    vocab: dict[str, int],
    added_map: dict[str, Any],
    config: dict[str, Any],
    named: dict[str, str],
) -> tuple[ControlToken, ...]:
    added = content.get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(added, list) or not isinstance(decoder, dict):
        raise damaged(path, "added_tokens should be a list, added_tokens_decoder an object")
    if len(added) + len(decoder) + len(added_map) > MAX_ADDED_TOKENS:
        raise damaged(path, f"more than {MAX_ADDED_TOKENS:,} added tokens")
    found: dict[int, ControlToken] = {}
    for record in added:
        _add(path, found, record.get("id") if isinstance(record, dict) else None, record)
    for key, record in decoder.items():
        _add(
            path.parent / "tokenizer_config.json", found, int(key) if key.isdecimal() and len(key) < 9 else key, record
        )
    for text, i in added_map.items():
        _add(path.parent / "added_tokens.json", found, i, {"content": text})
    for text in named.values():
        if text in vocab:
            _add(path, found, vocab[text], {"content": text})
    ids = {token.content: token.id for token in found.values()}
    pieces = {i: piece for piece, i in vocab.items()}
    for token in found.values():
        in_vocab = vocab.get(token.content, token.id)
        if (
            ids[token.content] != token.id
            or in_vocab != token.id
            or pieces.get(token.id, token.content) != token.content
        ):
            raise damaged(path, f"added token {token.content!r} has the id {token.id}, and the vocabulary disagrees")
    return tuple(found[i] for i in sorted(found))


def _add(path: Path, found: dict[int, ControlToken], i: Any, record: Any) -> None:
    text = record.get("content") if isinstance(record, dict) else None
    if type(i) is not int or not 0 <= i < MAX_VOCAB or not isinstance(text, str) or not text:
        raise damaged(path, f"added token {text!r} has no usable id or text: {i!r}")
    if i in found and found[i].content != text:
        raise damaged(path, f"added tokens {found[i].content!r} and {text!r} share the id {i}")
    found.setdefault(i, ControlToken(i, text, record.get("lstrip") is True, record.get("rstrip") is True))


def _is_byte_level(path: Path, decoder: Any) -> bool:
    kinds = [step.get("type") for step in _steps(path, decoder, "decoders")]
    if "ByteLevel" in kinds:
        return True
    if "ByteFallback" in kinds:
        return False
    raise damaged(path, "decoder is neither ByteLevel nor ByteFallback: text could not be given back exactly")


def _steps(path: Path, part: Any, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder: one, none, or those of a Sequence."""
    if part is None:
        return []
    steps = part.get(key) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise damaged(path, f"{key} should be objects with a type")
    return steps


def _take_prefix(path: Path, content: dict[str, Any], is_byte_level: bool) -> PrefixRule:
    """Takes the dummy prefix and NFC out of the normalizer and pre-tokenizer; refuses what would change text."""
    rule, kept, marks = PrefixRule(), [], set()
    for step in _steps(path, content.get("normalizer"), "normalizers"):
        match step:
            case {"type": "NFC"} if is_byte_level:
                continue
            case {"type": "Prepend", "prepend": str(mark)} if mark == SPACE_MARK and not is_byte_level:
                rule = PrefixRule(frozenset({Place.START, Place.CONTROL}), is_forced=True)
            case {"type": "Replace", "pattern": {"String": " "}, "content": str(mark)} if mark == SPACE_MARK:
                kept.append(step)
                marks.add("Metaspace")
            case _:
                raise damaged(path, f"normalizer {step.get('type')!r} would change the text, not supported")
    for step in _steps(path, content.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Metaspace"}:
                rule = _take_metaspace_prefix(path, step)
                marks.add("Metaspace")
            case {"type": "ByteLevel"}:
                if step.get("add_prefix_space", True):
                    raise damaged(path, "pre_tokenizer ByteLevel with add_prefix_space is not supported")
                marks.add("ByteLevel")
            case {"type": "Digits"}:
                pass
            case {"type": "Split" | "Punctuation", "behavior": behavior} if behavior != "Removed":
                pass
            case _:
                raise damaged(path, f"pre_tokenizer {step.get('type')!r} is not supported")
    if marks != ({"ByteLevel"} if is_byte_level else {"Metaspace"}):
        raise damaged(path, "normalizer, pre_tokenizer and decoder do not fit together")
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return rule


def _take_metaspace_prefix(path: Path, step: dict[str, Any]) -> PrefixRule:
    scheme = step.get("prepend_scheme", "always" if step.pop("add_prefix_space", True) else "never")
    places = {"always": {Place.START, Place.CONTROL}, "first": {Place.START}, "never": set[Place]()}
    if scheme not in places or step.get("replacement") != SPACE_MARK:
        raise damaged(path, f"pre_tokenizer Metaspace with prepend_scheme {scheme!r} is not supported")
    step["prepend_scheme"] = "never"
    return PrefixRule(frozenset(places[scheme]))


def _take_control(model: dict[str, Any], gone: set[str], is_byte_level: bool) -> None:
    """Takes control tokens, and every merge that yields or uses one, out of the model.

    In a SentencePiece model the byte pieces go out of the merges too: a text that says <0x41> is no byte.
    """
    unmade = gone if is_byte_level else gone | {byte_piece(byte) for byte in range(256)}
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in gone}
    model["merges"] = [merge for merge in model["merges"] if not _touches(merge, unmade)]
    model["unk_token"] = None  # every byte has a piece


def _touches(merge: Any, pieces: set[str]) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return False  # malformed: the library refuses it with its own words
    return "".join(parts) in pieces or any(part in pieces for part in parts)


def _check_bytes(path: Path, model: dict[str, Any], is_byte_level: bool) -> None:
    """Every byte must have a piece, and a byte piece of SentencePiece no other way to it than the byte."""
    wanted = byte_alphabet() if is_byte_level else [*map(byte_piece, range(256)), SPACE_MARK]
    for piece in wanted:
        if piece not in model["vocab"]:
            raise damaged(path, f"the piece {piece!r} is missing: text could not be given back exactly")
    if not is_byte_level and (model.get("byte_fallback") is not True or model.get("ignore_merges")):
        raise damaged(path, "model without byte_fallback, or with ignore_merges beside it, is not supported")


def _start_and_stop(
    folder: Path, config: dict[str, Any], named: dict[str, str], control: dict[str, int], vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """The id put first, None where there is none, and the ids that end an answer."""
    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token"):
        if name in named and named[name] not in control:
            raise damaged(folder / "tokenizer_config.json", f"{name} {named[name]!r} is not in the vocabulary")
        if name in named:
            ids[name] = control[named[name]]
    generation = read_json(folder / "generation_config.json", MAX_CONFIG_BYTES) or {}
    source, stops = "generation_config.json", generation.get("eos_token_id")
    if stops is None:
        source = "config.json"
        stops = (read_json(folder / source, MAX_CONFIG_BYTES) or {}).get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    for i in stops:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise damaged(folder / source, f"eos_token_id {i!r} is not in the vocabulary")
    bos_id = ids.get("bos_token") if config.get("add_bos_token") is not False else None
    return bos_id, tuple(dict.fromkeys([*([ids["eos_token"]] if "eos_token" in ids else []), *stops]))
