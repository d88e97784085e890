"""Asks one model many questions: conversations in, answers and records out; for every evaluation that asks.

Prompts that begin alike are read from where they part: a state is kept behind the documents and at ends of documents,
as in a session. An answer is the same as for a prompt that is read from its start, since the chunks are the same.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from salalocal import __version__
from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.folder import ModelFolder
from salalocal.checkpoint.hub import find_model
from salalocal.engine.sampling_params import SamplingParams
from salalocal.evals.scoring import Mark
from salalocal.evals.study import OnTokens, Record, Task
from salalocal.prompt.template import Conversation
from salalocal.prompt.text_stream import TextStream
from salalocal.session.generation import Generation
from salalocal.session.prefix import PrefixStore
from salalocal.session.reading import Prompt, Read, read_prompt
from salalocal.session.runtime import LoadOptions, Runtime, open_runtime
from salalocal.session.session import SAVE_BYTES
from salalocal.session.start import Tell, model_choice, read_config
from salalocal.session.thinking import split_thinking
from salalocal.session.tokens import TextCodec, answer_room, default_max_tokens
from salalocal.settings import Settings

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"}
_NO_INFLUENCE = {"model", "ctx", "kv_place", "system", "origins", *_SAMPLING}
_MAX_TEXT = 4096  # characters of an answer that a record keeps


@dataclass(frozen=True)
class Answer:
    """What the model said. Units: tokens; seconds of reading and of answering."""

    text: str
    reason: str
    context_tokens: int
    cached_tokens: int
    answer_tokens: int
    read_s: float
    answer_s: float


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn is open, what the answer should hold, and how it is marked."""

    conversation: Conversation
    expected: tuple[str, ...]
    mark: Callable[[str], Mark]


@dataclass(frozen=True)
class Case:
    """A question that is only made when it is asked. `key` names it; `labels` say where its record belongs.

    Units: cost_tokens, about how many tokens are read for it.
    """

    key: str
    label: str
    labels: Mapping[str, Any]
    cost_tokens: int
    make: Callable[[], Question]


@dataclass(frozen=True)
class Subject:
    """A model that is to be asked: found, its text side open, its weights not loaded yet."""

    settings: Settings
    folder: ModelFolder
    codec: TextCodec

    @classmethod
    def find(cls, settings: Settings, tell: Tell) -> "Subject":
        """Find the chosen model and tell which it is. Raises: HubError, CheckpointError."""
        tell(model_choice(settings))
        folder = find_model(settings.model)
        return cls(settings, folder, TextCodec.from_folder(folder.path))

    @property
    def context_limit(self) -> int | None:
        """How many tokens the model was made for, if it says so."""
        return read_config(self.folder).max_position_embeddings

    @property
    def max_tokens(self) -> int:
        """The longest answer, in tokens."""
        return self.settings.max_tokens or default_max_tokens(self.settings.model)

    def identity(self) -> Record:
        """What decides its answers, as plain data: the weights are named by samples of each tensor."""
        return {
            "salalocal": __version__,
            "model": self.settings.model,
            "model_sha256": Checkpoint.open(self.folder).fingerprint,
            "template_sha256": self.codec.template.digest,
            "answer_tokens": self.max_tokens,
            **{name: value for name, value in asdict(self.settings).items() if name not in _NO_INFLUENCE},
        }

    def open(self, num_tokens: int) -> Runtime:
        """Load the weights, with room for contexts of `num_tokens`. Raises: as `open_runtime`."""
        options = LoadOptions.of(self.settings, num_tokens + answer_room(self.max_tokens))
        return open_runtime(self.folder, self.settings.model, options, self.codec)


class Asker:
    """Asks questions of a runtime, greedily, each on its own."""

    def __init__(self, runtime: Runtime, max_tokens: int) -> None:
        self._runtime = runtime
        self._params = SamplingParams(max_tokens=max_tokens)
        point_bytes = max(1, runtime.engine.new_state().nbytes)
        self._store = PrefixStore(SAVE_BYTES // point_bytes)

    def ask(self, conversation: Conversation, on_tokens: OnTokens = lambda num_tokens: None) -> Answer:
        """Read a conversation as far as it is new and answer its open question.

        Raises: MemoryBudgetError, NumericError, RequestError, CheckpointError for a template that cannot be used.
        """
        runtime = self._runtime
        segments = runtime.codec.template.render(conversation)
        # Reading stops at every save point, and given answers are none here: no other prompt goes on from them.
        prompt = Prompt([replace(s, is_save_point=s.is_save_point and s.kind == "document") for s in segments])
        self._store.keep_prefixes_of(prompt.tokens)
        read = self._read(prompt, on_tokens)
        if read.logits is None:
            raise ValueError("a read that nobody can cancel was cancelled")
        tokens = runtime.engine.generate(read.state, read.logits, self._params, runtime.stop_ids)
        generation = Generation(tokens, TextStream(runtime.tokenizer), runtime.stop_ids)
        started_s = time.monotonic()
        for _ in generation:
            pass
        return Answer(
            text=split_thinking(generation.text)[1],
            reason=generation.finish or "stop",
            context_tokens=read.num_tokens,
            cached_tokens=read.cached_tokens,
            answer_tokens=len(generation.token_ids),
            read_s=read.elapsed_s,
            answer_s=time.monotonic() - started_s,
        )

    def task(self, case: Case) -> Task:
        """A case as a task of a study."""

        def run(on_tokens: OnTokens) -> Record:
            question = case.make()
            answer = self.ask(question.conversation, on_tokens)
            return {**case.labels, **_record(question, answer)}

        return Task(case.key, case.label, case.cost_tokens, run)

    def _read(self, prompt: Prompt, on_tokens: OnTokens) -> Read:
        room = answer_room(self._params.max_tokens)
        steps = read_prompt(self._runtime.engine, prompt, self._store, lambda: False, room)
        position = -1
        while True:
            try:
                event = next(steps)
            except StopIteration as end:
                read: Read = end.value
                return read
            if position < 0:
                position = event.cached_tokens
            on_tokens(event.num_tokens - position)
            position = event.num_tokens


def _record(question: Question, answer: Answer) -> Record:
    mark = question.mark(answer.text)
    return {
        "right": mark.is_right,
        "score": round(mark.score, 6),
        "expected": [text[:_MAX_TEXT] for text in question.expected],
        "answer": answer.text[:_MAX_TEXT],
        "reason": answer.reason,
        "context_tokens": answer.context_tokens,
        "cached_tokens": answer.cached_tokens,
        "answer_tokens": answer.answer_tokens,
        "read_s": round(answer.read_s, 3),
        "answer_s": round(answer.answer_s, 3),
    }
