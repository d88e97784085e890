"""Invented names, values and files: the randomised half of the training tasks.

In: a random generator and a word list. Out: identifiers, literal values, configuration files and sentences with one
fact. For: training/archive.py. Words of several pieces are split by a hash into training words and held-out words for
the evaluation; words that are one piece of the tokenizer all belong to training, since every piece has to be learned to
be copied.
"""

import random
import re
import string
import zlib
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer

WORD = re.compile(r"[A-Za-z][a-z]{2,9}")
HELD_OUT_SHARE = 10

SUBJECTS = tuple(
    re.findall(
        r"\w+", "server client worker queue cache service gateway archive scheduler index parser lamp tower sensor"
    )
)
NOUNS = tuple(
    re.findall(
        r"\w+",
        "port version limit owner colour region password code name size interval address level number token path "
        "weight depth rate secret mirror channel schedule contact licence label height speed budget",
    )
)


def word_list(texts: Iterable[str], tokenizer: Tokenizer, is_heldout: bool, size: int = 8000) -> list[str]:
    """Lower-case words of the corpus, the common ones first; of those of several pieces one in ten is held out."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(match.lower() for match in WORD.findall(text))
    vocabulary = tokenizer.get_vocab()
    wanted = []
    for word, _ in counts.most_common(6 * size):
        is_split = word not in vocabulary and "Ġ" + word not in vocabulary
        if is_heldout == (is_split and zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0):
            wanted.append(word)
    return wanted[:size]


def piece_list(tokenizer: Tokenizer) -> list[str]:
    """The pieces of the tokenizer that are letters, as they are, without a leading space."""
    return sorted({p.lstrip("Ġ") for p in tokenizer.get_vocab() if re.fullmatch(r"Ġ?[A-Za-z]{2,}", p)})


class Inventor:
    """Draws names and values; every draw comes from the given generator."""

    def __init__(self, rng: random.Random, words: list[str], pieces: list[str]):
        self.rng = rng
        self.words = words
        self.pieces = pieces

    def word(self) -> str:
        """One word, at times a made-up one or a piece of the tokenizer."""
        draw = self.rng.random()
        if self.pieces and draw < 0.3:
            return self.rng.choice(self.pieces)
        if draw < 0.38:
            return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randint(2, 6)))
        return self.rng.choice(self.words)

    def name(self, style: str) -> str:
        """An identifier: "upper", "snake", "camel", "pascal" or "dash"."""
        count = self.rng.choices([1, 2, 3, 4], [0.12, 0.5, 0.3, 0.08])[0]
        words = [self.word() for _ in range(count)]
        if self.rng.random() < 0.06:
            words.append(str(self.rng.randint(1, 99)))
        if self.pieces and self.rng.random() < 0.12:
            return "_".join(self.rng.choices(self.pieces, k=count + 1))
        if style == "upper":
            return "_".join(words).upper()
        if style == "camel":
            return words[0].lower() + "".join(w.capitalize() for w in words[1:])
        if style == "pascal":
            return "".join(w.capitalize() for w in words)
        return ("-" if style == "dash" else "_").join(w.lower() for w in words)

    def number(self) -> str:
        """A whole or decimal number of any size."""
        kind = self.rng.random()
        if kind < 0.75:
            return str(self.rng.randint(0, 10 ** self.rng.randint(1, 6)))
        return f"{self.rng.uniform(0, 100):.{self.rng.randint(1, 3)}f}"

    def text(self) -> str:
        """A string value without quotes."""
        rng = self.rng
        kind = rng.randrange(9)
        if kind == 0:
            return f"https://{self.word()}.{self.word()}.{rng.choice(['org', 'com', 'net', 'io'])}/{self.word()}"
        if kind == 1:
            return f"/{rng.choice(['var', 'etc', 'opt', 'srv', 'tmp'])}/{self.word()}/{self.word()}"
        if kind == 2:
            return ".".join(str(rng.randint(0, 30)) for _ in range(3))
        if kind == 3:
            return "".join(rng.choices("0123456789abcdef", k=rng.choice([6, 8, 12])))
        if kind == 4:
            return ".".join(str(rng.randint(0, 255)) for _ in range(4))
        if kind == 5:
            return f"{self.word()}@{self.word()}.{rng.choice(['org', 'com', 'net'])}"
        return rng.choice(["-", " ", "_"]).join(self.word() for _ in range(rng.randint(1, 3)))

    def literal(self, quote: str = '"') -> str:
        """A Python literal."""
        kind = self.rng.random()
        if kind < 0.45:
            return self.number()
        if kind < 0.8:
            return quote + self.text() + quote
        if kind < 0.9:
            return self.rng.choice(["True", "False", "None"])
        if kind < 0.96:
            return "[" + ", ".join(self.number() for _ in range(self.rng.randint(1, 3))) + "]"
        return f"{self.rng.randint(2, 60)} * {self.rng.choice([60, 1024, 3600])}"

    def path(self, name: str) -> str:
        """A path for a file of that name."""
        parts = [self.word() for _ in range(self.rng.choices([0, 1, 2], [0.4, 0.4, 0.2])[0])]
        return "/".join([*parts, name])

    def fact_sentence(self) -> tuple[str, str]:
        """A named quantity and a sentence that gives its value."""
        rng = self.rng
        noun = rng.choice(NOUNS)
        shape = rng.randrange(3)
        if shape == 0:
            topic = f"{noun} of the {self.word()} {rng.choice(SUBJECTS)}"
        elif shape == 1:
            topic = f"{self.word()} {noun} of {self.word()}"
        else:
            topic = f"{self.word()} {self.word()} {noun}"
        value = self.number() if rng.random() < 0.5 else self.text()
        return topic, f"The {topic} is {value}."

    def config_lines(self, suffix: str, count: int) -> list[str]:
        """Lines of a configuration file with `count` keys in the form of its suffix."""
        rng, lines = self.rng, []
        if suffix == ".json":
            lines.append("{\n")
        for number in range(count):
            if suffix != ".json" and rng.random() < 0.15:
                lines.append(f"# {self.word()} {self.word()} {self.word()}\n")
            if suffix in (".toml", ".ini") and rng.random() < 0.15:
                lines.append(f"[{self.word()}]\n")
            lines.append(self.config_line(suffix, number + 1 == count))
        return [*lines, "}\n"] if suffix == ".json" else lines

    def config_line(self, suffix: str, is_last: bool) -> str:
        """One key with its value."""
        rng = self.rng
        if suffix == ".json":
            value = self.number() if rng.random() < 0.5 else f'"{self.text()}"'
            return f'  "{self.name(rng.choice(["snake", "camel", "dash"]))}": {value}' + ("\n" if is_last else ",\n")
        if suffix == ".yaml":
            value = self.number() if rng.random() < 0.5 else self.text()
            return f"{'  ' if rng.random() < 0.3 else ''}{self.name(rng.choice(['snake', 'dash']))}: {value}\n"
        if suffix == ".env":
            return f"{self.name('upper')}={self.number() if rng.random() < 0.5 else self.text()}\n"
        if suffix == ".toml":
            value = rng.choice([self.number(), f'"{self.text()}"', "true", "false"])
            return f"{self.name(rng.choice(['snake', 'dash']))} = {value}\n"
        if suffix == ".ini":
            return f"{self.name('snake')} = {self.number() if rng.random() < 0.5 else self.text()}\n"
        return f"{self.name('upper' if rng.random() < 0.75 else 'snake')} = {self.literal(rng.choice(QUOTES))}\n"


QUOTES = ['"', '"', "'"]
