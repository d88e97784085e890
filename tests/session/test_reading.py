"""A prompt in steps: where it stops, what it saves, what it tells."""

from salalocal.prompt.template import Segment, SegmentKind
from salalocal.session.prefix import PrefixStore
from salalocal.session.reading import Prompt, read_prompt
from salalocal.session.runtime import Runtime


def segment(kind: SegmentKind, length: int, label: str = "", is_save_point: bool = False) -> Segment:
    return Segment((5,) * length, kind, label or kind, is_save_point)


def documents(*lengths: int) -> Prompt:
    middle = [segment("document", length, f"{n}.txt", n == len(lengths) - 1) for n, length in enumerate(lengths)]
    return Prompt([segment("template", 4), *middle, segment("question", 6)])


def test_states_are_saved_behind_documents_that_lie_apart_and_behind_the_last() -> None:
    prompt = documents(10, 10, 70, 5, 64, 3)
    assert prompt.save_positions(chunk_size=32) == [94, 163, 166]
    assert prompt.documents_end == 166


def test_where_states_are_saved_depends_only_on_what_stands_before() -> None:
    long = documents(10, 90, 40, 70, 5).save_positions(32)
    short = documents(10, 90, 40).save_positions(32)
    assert short[:-1] == [position for position in long if position < short[-1]]


def test_answers_are_saved_too() -> None:
    prompt = Prompt([segment("question", 5), segment("answer", 3, is_save_point=True), segment("question", 2)])
    assert prompt.save_positions(32) == [8]


def test_progress_names_the_document_that_is_being_read() -> None:
    prompt = documents(10, 20)
    first, second, end = (prompt.progress(at, 2, 0.5, False) for at in (14, 15, 40))
    assert (first.path, first.document, first.document_tokens, first.document_left) == ("0.txt", 1, 10, 0)
    assert (second.path, second.document, second.document_tokens, second.document_total) == ("1.txt", 2, 1, 20)
    assert (end.path, end.num_tokens, end.total_tokens, end.num_documents) == ("", 40, 40, 2)
    assert (second.new_tokens, second.tokens_per_s) == (13, 26.0)


def test_a_read_ends_in_a_state_that_holds_the_prompt(runtime: Runtime) -> None:
    prompt = documents(40, 90, 33)
    store = PrefixStore(10)
    reading = read_prompt(runtime.engine, prompt, store, lambda: False, 64)
    events = []
    while True:
        try:
            events.append(next(reading))
        except StopIteration as end:
            read = end.value
            break
    assert read.is_whole and read.num_tokens == read.state.num_tokens == len(prompt.ids)
    assert [event.num_tokens for event in events] == [32, 64, 96, 128, 134, 160, 167, 173]
    found = store.longest(prompt.tokens)
    assert found is not None and found.num_tokens == len(prompt.ids)
    assert found.state is not read.state, "a saved state must not be the one that goes on"


def test_a_paused_read_goes_on_through_the_same_chunks(runtime: Runtime) -> None:
    prompt = documents(40, 90, 33)
    store = PrefixStore(10)
    paused = list(read_prompt(runtime.engine, prompt, store, lambda: True, 64))
    assert len(paused) == 1 and paused[0].is_paused
    resumed = list(read_prompt(runtime.engine, prompt, store, lambda: False, 64))
    assert resumed[0].cached_tokens == 32
    assert [event.num_tokens for event in resumed] == [64, 96, 128, 134, 160, 167, 173]


def test_rates_without_time_are_zero() -> None:
    assert documents(10).progress(4, 0, 0.0, False).tokens_per_s == 0
