"""Byte-level BPE of the embedded model.

In: training/data/corpus.jsonl.gz (training split only). Out: tokenizer.json, tokenizer_config.json and
special_tokens_map.json in salalocal/builtin/. For: every other training script and the runtime.
Run: `python training/tokenizer.py`.

No piece crosses a line end, and digits stand alone. So encoding a text line by line gives the same ids as encoding it
whole, which lets the task generator insert lines without encoding a file again.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CORPUS = HERE / "data" / "corpus.jsonl.gz"
BUILTIN = HERE.parent / "salalocal" / "builtin"

VOCAB_SIZE = 8192
BASE_TOKENS = ["<unk>", "<s>", "</s>"]
CONTROL_TOKENS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
]
PIECES = r"\n+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?![^\n])|[^\S\n]+(?!\S)|[^\S\n]+"
SAMPLE_BYTES = 14_000_000


def sample() -> Iterator[str]:
    """Every fourth training file until the sample is full."""
    used = 0
    with gzip.open(CORPUS, "rt") as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            if record["split"] != "train" or number % 4:
                continue
            used += len(record["text"])
            if used > SAMPLE_BYTES:
                return
            yield record["text"]


def train() -> Tokenizer:
    """A tokenizer with the base tokens first and the control tokens last."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS),
        special_tokens=BASE_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and its two companions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "</s>"}
    added = {}
    for token in BASE_TOKENS + CONTROL_TOKENS:
        record = {"content": token, "special": True, "normalized": False}
        added[str(tokenizer.token_to_id(token))] = {**record, "lstrip": False, "rstrip": False, "single_word": False}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 524288,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")


def main() -> None:
    """Trains and writes the tokenizer."""
    tokenizer = train()
    if tokenizer.get_vocab_size() != VOCAB_SIZE or tokenizer.token_to_id("<s>") != 1:
        raise SystemExit(f"unexpected vocabulary: {tokenizer.get_vocab_size()} tokens")
    write(tokenizer, BUILTIN)
    text = 'MAX_RETRIES = 5\n\ndef connect(host, port=8080):\n    return "tcp://%s" % host\n'
    print(tokenizer.encode(text).tokens)
    if tokenizer.decode(tokenizer.encode(text).ids) != text:
        raise SystemExit("the tokenizer does not give its text back")


if __name__ == "__main__":
    main()
