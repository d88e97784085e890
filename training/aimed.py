"""Archives aimed at the main job: which file defines X, the value of X in F, names that nearly are there.

In: an `ArchiveMaker`. Out: `Sample`s of the same form as its own. For: training/batches.py.

What differs from `ArchiveMaker.sample`: a quarter of the questions ask for a file (a tenth there), also for the file of
a constant; names have neighbours that differ in one word, and the same name stands in two files; archives are crowded
with small files, so that a header is not found by chance, or have a few long ones, so that it is far above; and in some
samples the documents count from a number up to 990, since an archive of 256K tokens has hundreds of files and training
never sees so many at once.
"""

from training import wording
from training.addresses import MAX_NUMBER
from training.archive import Document, SampleMaker, unique_paths
from training.facts import Fact
from training.transcript import Sample, Turn

WEIGHTS = {
    "where": 4.5,
    "value": 2.5,
    "twin": 2.0,
    "key": 1.2,
    "def": 1.0,
    "fact": 0.9,
    "import": 0.8,
    "default": 0.8,
    "class": 0.7,
    "return": 0.7,
    "doc": 0.6,
    "begins": 0.5,
}
CONSTANT_SHARE = 0.25  # of the questions for a file
MISSING_SHARE = 0.13
NEARLY_SHARE = 0.4  # of the missing names
CHAT_SHARE = 0.015
DEEP_SHARE, CROWDED_SHARE = 0.3, 0.4
COUNTED_FROM_SHARE = 0.3
MAX_DOCUMENTS = 160
TOKENS_PER_TURN = 46
PLANTABLE = (".py", ".md", ".rst", ".toml", ".cfg")

Found = dict[str, list[tuple[int, Fact]]]


class AimedMaker(SampleMaker):
    """Makes samples; draws from the generator of its archive maker."""

    def sample(self, length: int) -> Sample:
        """A conversation of at most `length` + 1 tokens over one archive."""
        archives, rng = self.archives, self.rng
        count = max(3, min(40, length // 130))
        documents = self.documents(length - TOKENS_PER_TURN * count - 30, max(2, count // 2))
        first = rng.randint(2, MAX_NUMBER - len(documents)) if rng.random() < COUNTED_FROM_SHARE else 1
        ids, line_at, path_at = archives.prompt(documents, first=first)
        while documents and len(ids) > length - 60:
            documents.pop()
            ids, line_at, path_at = archives.prompt(documents, first=first)
        turns = self.turns(documents, count + 4)
        return archives.conversation(documents, ids, line_at, path_at, turns, length, first)

    # -- documents ---------------------------------------------------------------------------------------------

    def documents(self, budget: int, num_plants: int) -> list[Document]:
        """Files of different paths with invented lines in them, each of which may have near neighbours."""
        room = budget - 24 * num_plants
        draw = self.rng.random()
        if draw < DEEP_SHARE + CROWDED_SHARE:
            found = self.real_files(room, is_crowded=draw >= DEEP_SHARE)
        else:
            found = self.archives.documents(room)
        documents = unique_paths(found)
        plantable = [d for d in documents if d.path.endswith(PLANTABLE)]
        for _ in range(num_plants if plantable else 0):
            self.archives.plant(self.rng.choice(plantable))
        if plantable and self.rng.random() < 0.7:
            for _ in range(self.rng.randint(1, max(1, num_plants // 3))):
                self.plant_neighbour(plantable)
        if self.rng.random() < 0.8:
            for _ in range(self.rng.randint(1, 3)):
                self.archives.twin(plantable)
        return documents

    def real_files(self, budget: int, is_crowded: bool) -> list[Document]:
        """Files of one or two packages: many small ones, or a few long ones and small ones between them."""
        rng, corpus = self.rng, self.archives.corpus
        names = rng.choices(corpus.names, list(corpus.weights), k=rng.choice([1, 2]))
        found: list[Document] = []
        left = budget
        while left > 100 and len(found) < MAX_DOCUMENTS:
            is_long = not is_crowded and rng.random() < 0.7
            size = min(left, int(400 * 20 ** rng.random()) if is_long else rng.randint(30, 160))
            document = self.archives.real_file(rng.choice(corpus.packages[rng.choice(names)]), size)
            if document is None:
                left -= 8
                continue
            found.append(document)
            left -= document.num_tokens + 50
        rng.shuffle(found)
        return found

    def near(self, name: str) -> str:
        """A name that differs from another one in a word: exchanged, added or left out."""
        rng, parts = self.rng, name.split("_")
        word = self.inventor.word().upper() if name.isupper() else self.inventor.word().lower()
        draw, at = rng.random(), rng.randrange(len(parts))
        if draw < 0.6 and len(parts) > 1:
            parts[at] = word
        elif draw < 0.75 and len(parts) > 2:
            del parts[at]
        else:
            parts.insert(at + 1, word)
        return "_".join(parts)

    def plant_neighbour(self, documents: list[Document]) -> None:
        """A constant or a function whose name is nearly that of another one."""
        known = [f.key for d in documents for f in d.facts if f.kind in ("value", "def") and f.key.isidentifier()]
        if not known:
            return
        name, document = self.near(self.rng.choice(known)), self.rng.choice(documents)
        at = self.rng.randrange(len(document.lines) + 1)
        if name.islower() and self.rng.random() < 0.6:
            text = f"def {name}({self.inventor.word()}):"
            rows = [text, f"    return {self.inventor.literal()}"]
            facts = [("def", name, text, 0, ""), ("where", name, "", 0, ""), ("return", name, rows[1].strip(), 1, "")]
            self.archives.insert(document, at, rows, facts)
        else:
            text = f"{name} = {self.inventor.literal()}"
            self.archives.insert(document, at, [text], [("value", name, text, 0, "")])

    # -- questions ---------------------------------------------------------------------------------------------

    def turns(self, documents: list[Document], count: int) -> list[Turn]:
        """`count` questions about the archive, no two with the same answer."""
        found = self.archives.candidates(documents)
        kinds = [kind for kind in WEIGHTS if found.get(kind)]
        weights = [WEIGHTS[kind] for kind in kinds]
        turns: dict[tuple[str, str], Turn] = {}
        for _ in range(2 * count):
            draw = self.rng.random()
            if draw < CHAT_SHARE:
                turn = self.archives.chat()
            elif draw < CHAT_SHARE + MISSING_SHARE or not kinds:
                turn = self.missing(documents, found)
            else:
                turn = self.asked(documents, found, self.rng.choices(kinds, weights)[0])
            turns.setdefault((turn.kind, turn.answer), turn)
            if len(turns) == count:
                break
        return list(turns.values())

    def asked(self, documents: list[Document], found: Found, kind: str) -> Turn:
        """A question of a kind for which there is a candidate; a question for a file may be one for a constant's."""
        constants = found.get("value", []) + found.get("key", [])
        if kind == "where" and constants and self.rng.random() < CONSTANT_SHARE:
            index, fact = self.rng.choice(constants)
            question = self.rng.choice(wording.QUESTIONS["where"]).format(k=fact.key)
            answer = wording.WHERE.format(k=fact.key, f=documents[index].path)
            return Turn("where", question, answer, index, fact.line, fact.key)
        return self.archives.turn(documents, found, kind)

    def missing(self, documents: list[Document], found: Found) -> Turn:
        """A question about a name that is not there; often it is nearly one that is."""
        known = [
            fact for kind in ("value", "def", "where") for _, fact in found.get(kind, []) if fact.key.isidentifier()
        ]
        if known and self.rng.random() < NEARLY_SHARE:
            fact = self.rng.choice(known)
            name = self.near(fact.key)
            if not any(name in line for document in documents for line in document.lines):
                question = self.rng.choice(wording.QUESTIONS[fact.kind]).format(k=name)
                return Turn("missing", question, wording.NOT_FOUND.format(k=name), key=name)
        return self.archives.missing(documents, found)
