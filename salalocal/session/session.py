"""A conversation about documents: questions go in, events come out; for chat, ask, server and programs.

A model state is never trimmed. It is saved behind the documents, behind each question and each answer; whatever
changes (undo, retry, add, drop), reading goes on from the longest saved state that is a prefix of the new prompt.
"""

import inspect
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from salalocal.device import peak_memory_bytes
from salalocal.engine.picks import AnswerPicks, Picks, first_picking
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import PackError, RequestError
from salalocal.model.mixers.sparse import block_geometry
from salalocal.model.state import ModelState
from salalocal.prompt.pack import PromptPack
from salalocal.prompt.sources import Reading, read_sources
from salalocal.prompt.template import Conversation
from salalocal.prompt.template import Turn as PromptTurn
from salalocal.prompt.text_stream import TextStream
from salalocal.session.attribution import (
    NEUTRAL_QUESTIONS,
    NEUTRAL_TOKENS,
    AnswerSources,
    DocumentPlaces,
    find_sources,
    ids_behind_documents,
)
from salalocal.session.events import Event, Finish, ReadProgress, ThinkingDelta, Usage
from salalocal.session.generation import Generation, ids_of_text
from salalocal.session.prefix import BYTES_PER_TOKEN, PrefixStore, SavePoint, token_bytes
from salalocal.session.reading import Prompt, Read, read_prompt
from salalocal.session.thinking import route, split_thinking
from salalocal.session.tokens import QUESTION_TOKENS, ContextOverflow, TokenReport, answer_room, report_tokens

if TYPE_CHECKING:
    from salalocal.session.runtime import Runtime

SAVE_BYTES = 512 * 2**20
NUM_SOURCES = 10

_Event = TypeVar("_Event")


def one_or_more(paths: Sequence[str | Path] | str | Path) -> Sequence[str | Path]:
    """Paths given as one or as several, always as several."""
    return [paths] if isinstance(paths, str | Path) else paths


@dataclass(frozen=True)
class Turn:
    """A question with its answer; `answer_ids` hold the thinking too and are what the model sees again."""

    question: str
    answer: str
    thinking: str
    answer_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class SessionOptions:
    """What a session is opened with. Units: context_limit in tokens; None means as much as memory holds."""

    sampling: SamplingParams
    system: str | None = None
    stop: tuple[str, ...] = ()
    context_limit: int | None = None
    save_bytes: int = SAVE_BYTES


class Session:
    """Documents, turns and the states that hold them. One call at a time; `cancel` may come from anywhere.

    `sampling` may be changed between turns.
    """

    def __init__(self, runtime: "Runtime", pack: PromptPack | None, options: SessionOptions) -> None:
        self.sampling = options.sampling
        self._runtime = runtime
        self._options = options
        self._pack = pack
        self._turns: list[Turn] = []
        # At zero tokens a state is just its lightning matrices: what a fork costs while rows are shared.
        point_bytes = max(1, runtime.engine.new_state().nbytes)
        self._store = PrefixStore(options.save_bytes // point_bytes)
        self._cancelled = threading.Event()
        self._running: weakref.ref[Generator[Any, None, None]] | None = None
        self._picked: tuple[Turn, AnswerPicks] | None = None
        self._usual: tuple[bytes, Picks] | None = None
        self._check(self._render(()))  # a pack that does not fit is refused before anything is read

    @property
    def pack(self) -> PromptPack | None:
        """The documents."""
        return self._pack

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The questions and answers so far."""
        return tuple(self._turns)

    def token_report(self) -> TokenReport:
        """How many tokens each document and the whole conversation take."""
        return report_tokens(self._render(self._prompt_turns()).segments, self._pack, self._options.context_limit)

    def cancel(self) -> None:
        """Stop the running read or answer at the next chunk or token; safe from a signal handler or another thread."""
        self._cancelled.set()

    def read(self) -> Iterator[ReadProgress]:
        """Read the documents (all that is not read yet) and save the state behind them.

        If cancelled, the last event says `is_paused`; nothing is lost, the next read or question goes on from there.
        Raises: NumericError, MemoryBudgetError.
        """
        self._end_running()
        self._cancelled.clear()
        return self._started(self._read_documents())

    def ask(
        self, question: str, sampling: SamplingParams | None = None, stop: Sequence[str] | None = None
    ) -> Iterator[Event]:
        """Ask a question; reads what is not read yet, then answers, then ends in a `Finish`.

        Cancelled while reading, it ends in a paused ReadProgress and a Finish, and the question is not kept. Cancelled
        while answering (or no longer iterated), the part that was said is the answer. An error takes the turn back.
        Raises: RequestError, ContextError, NumericError, MemoryBudgetError.
        """
        self._end_running()
        return self._started(self._asking(question, sampling, stop))

    def sources(self, limit: int = NUM_SOURCES) -> AnswerSources:
        """The lines of the documents that the last answer was read from, as far as what was picked tells.

        Units: limit in blocks of lines. Raises: RequestError where there is no answer, or nothing is known about it.
        """
        self._end_running()
        if not self._turns or self._pack is None:
            raise RequestError(
                "there is no answer about documents yet", "ask something" if self._pack else "/add reads some"
            )
        if self._picked is None or self._picked[0] is not self._turns[-1]:
            raise RequestError("what the last answer was read from is not known any more", "ask again, or /retry")
        prompt, config = self._render(()), self._runtime.config
        is_known = self._usual is not None and self._usual[0] == prompt.tokens
        usual = self._usual[1] if self._usual is not None and is_known else Picks.none(config)
        places = DocumentPlaces(prompt.segments, self._pack, self._runtime.tokenizer)
        return find_sources(self._picked[1], usual, block_geometry(config.sparse), places, limit)

    def _asking(
        self, question: str, sampling: SamplingParams | None, stop: Sequence[str] | None
    ) -> Generator[Event, None, None]:
        if not question.strip():
            raise RequestError("the question is empty", "write a question")
        prompt = self._render((*self._prompt_turns(), PromptTurn(question)))
        self._check(prompt)
        limit = self._options.context_limit
        room = None if limit is None else limit - len(prompt.ids)
        sampling = sampling or self.sampling
        if room is not None and sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room)
        self._cancelled.clear()
        stop = self._options.stop if stop is None else stop
        return self._ask(question, prompt, sampling, tuple(stop), (self._pack, self.turns))

    def undo(self) -> Turn:
        """Take back the last turn. Raises: RequestError if there is none."""
        self._end_running()
        if not self._turns:
            raise RequestError("there is no turn to take back", "ask something first")
        return self._turns.pop()

    def retry(self, sampling: SamplingParams | None = None) -> Iterator[Event]:
        """Answer the last question again; the old answer comes back if that fails. Raises: as `ask`."""
        self._end_running()
        if not self._turns:
            raise RequestError("there is no question to answer again", "ask something first")
        return self._started(self._retry(sampling))

    def set_pack(self, pack: PromptPack | None) -> None:
        """Go on about other documents, with the same turns. Raises: ContextError; then nothing changes."""
        self._end_running()
        before, self._pack = self._pack, pack
        try:
            prompt = self._render(self._prompt_turns())
            self._check(prompt)
        except BaseException:
            self._pack = before
            raise
        self._picked = None
        # Now, not at the next question: a state that lies ahead of the one to go on from would make it copy its rows.
        self._store.keep_prefixes_of(prompt.tokens)

    def add(self, files: Reading | Sequence[str | Path] | str | Path) -> None:
        """Put more documents behind those that are there, so that these are not read again.

        `files`: one path, several, or what `read_sources` gave. Raises: PackError, ContextError; nothing changes then.
        """
        reading = files if isinstance(files, Reading) else read_sources(one_or_more(files))
        if not reading.documents:
            raise PackError("no text found in what was added", "name a file, a folder or an archive with text in it")
        self.set_pack(PromptPack.build(reading) if self._pack is None else self._pack.add(reading.documents))

    def drop(self, paths: Sequence[str] | str) -> None:
        """Forget documents by path; those before the first of them are not read again.

        Raises: RequestError, PackError.
        """
        if self._pack is None:
            raise RequestError("there are no documents to drop", "/add reads some")
        pack = self._pack
        for path in one_or_more(paths):
            pack = pack.drop(str(path))
        self.set_pack(pack if pack.documents else None)

    def _prompt_turns(self) -> tuple[PromptTurn, ...]:
        return tuple(PromptTurn(turn.question, turn.answer_ids) for turn in self._turns)

    def _render(self, turns: tuple[PromptTurn, ...]) -> Prompt:
        return Prompt(self._runtime.codec.template.render(Conversation(self._options.system, self._pack, turns)))

    def _check(self, prompt: Prompt) -> None:
        limit = self._options.context_limit
        if limit is not None and len(prompt.ids) >= limit:
            raise ContextOverflow(report_tokens(prompt.segments, self._pack, limit), limit)

    def _read_documents(self) -> Generator[ReadProgress, None, None]:
        prompt = self._render(())
        if prompt.documents:
            room = QUESTION_TOKENS + answer_room(self.sampling.max_tokens)
            yield from self._reading(prompt, room)

    def _reading(self, prompt: Prompt, room: int) -> Generator[ReadProgress, None, Read]:
        return read_prompt(
            self._runtime.engine,
            prompt,
            self._store,
            self._cancelled.is_set,
            max(room, NEUTRAL_TOKENS),
            partial(self._note_usual_picks, prompt.tokens[: prompt.documents_end * BYTES_PER_TOKEN]),
        )

    def _note_usual_picks(self, documents: bytes, state: ModelState) -> None:
        """What neutral questions pick, asked behind the documents that `state` holds, the tokens `documents`."""
        if self._usual is not None and self._usual[0] == documents:
            return
        runtime, picks = self._runtime, Picks.none(self._runtime.config)
        for question in NEUTRAL_QUESTIONS:
            conversation = Conversation(self._options.system, self._pack, (PromptTurn(question),))
            ids = ids_behind_documents(runtime.codec.template.render(conversation))
            is_picking = state.num_tokens + len(ids) > first_picking(runtime.config, state)
            if is_picking and len(ids) <= NEUTRAL_TOKENS:
                picks += runtime.engine.next_picks(ids, state)
        self._usual = documents, picks

    def _started(self, events: "Generator[_Event, None, None]") -> "Generator[_Event, None, None]":
        """Note who works on the states now."""
        self._running = weakref.ref(events)
        return events

    def _end_running(self) -> None:
        """End a read or an answer that nobody iterates any more, before anything else is done."""
        events = self._running() if self._running is not None else None
        self._running = None
        if events is not None and inspect.getgeneratorstate(events) == inspect.GEN_SUSPENDED:
            events.close()

    def _ask(
        self,
        question: str,
        prompt: Prompt,
        sampling: SamplingParams,
        stop: tuple[str, ...],
        before: tuple[PromptPack | None, tuple[Turn, ...]],
    ) -> Generator[Event, None, None]:
        if before != (self._pack, self.turns):
            raise RequestError("the conversation went on before this question was begun", "ask it again")
        runtime = self._runtime
        stream = TextStream(runtime.tokenizer, stop)
        self._store.keep_prefixes_of(prompt.tokens)
        is_cancelled = self._cancelled.is_set
        read = yield from self._reading(prompt, answer_room(sampling.max_tokens))
        if not read.is_whole or read.logits is None:
            yield Finish("cancelled", self._usage(read))
            return
        tokens = runtime.engine.generate(read.state, read.logits, sampling, runtime.stop_ids, is_cancelled, prompt.ids)
        generation = Generation(tokens, stream, runtime.stop_ids)
        started_s, num_thinking = time.monotonic(), 0
        try:
            for event in route(generation):
                num_thinking += len(event.token_ids) if isinstance(event, ThinkingDelta) else 0
                yield event
        except GeneratorExit:
            generation.stop_here()
            raise
        finally:
            self._keep(question, prompt, read, generation)
        usage = self._usage(read, len(generation.token_ids), num_thinking, time.monotonic() - started_s)
        usage = replace(usage, right_guesses=generation.right_guesses)
        yield Finish(generation.finish or "stop", usage)

    def _keep(self, question: str, prompt: Prompt, read: Read, generation: Generation) -> None:
        """Make a turn that has ended part of the conversation, and save the state behind it."""
        drawn = generation.token_ids
        if generation.finish is None or (generation.finish == "cancelled" and not drawn):
            return
        thinking, answer = split_thinking(generation.text)
        ids = ids_of_text(drawn, generation.text, self._runtime.tokenizer) if generation.is_cut else drawn
        turn = Turn(question, answer, thinking, tuple(ids), generation.finish)
        self._turns.append(turn)
        read.state.settle()
        self._picked = turn, generation.picks
        held = drawn[: read.state.num_tokens - len(prompt.ids)]
        if ids[: len(held)] == held:  # else the state holds the stop string, which is no part of the turn
            self._store.put(SavePoint(prompt.tokens + token_bytes(held), read.state, None, is_pinned=False))

    def _retry(self, sampling: SamplingParams | None) -> Generator[Event, None, None]:
        turn = self._turns.pop()
        num_turns = len(self._turns)
        try:
            yield from self._asking(turn.question, sampling, None)
        finally:
            if len(self._turns) == num_turns:
                self._turns.append(turn)

    def _usage(self, read: Read, answer_tokens: int = 0, thinking_tokens: int = 0, answer_s: float = 0.0) -> Usage:
        return Usage(
            context_tokens=read.num_tokens,
            cached_tokens=read.cached_tokens,
            answer_tokens=answer_tokens,
            thinking_tokens=thinking_tokens,
            read_s=read.elapsed_s,
            answer_s=answer_s,
            peak_memory_bytes=peak_memory_bytes(self._runtime.engine.device),
        )
