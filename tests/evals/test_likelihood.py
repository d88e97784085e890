"""Likelihoods against whole-text logits in float64."""

import random
from pathlib import Path

import pytest
import tiny_model

from salalocal.evals.likelihood import Likelihood
from salalocal.session.runtime import Runtime


@pytest.fixture
def runtime(tmp_path: Path, seed: int) -> Runtime:
    return tiny_model.open_tiny_runtime(tmp_path / "tiny", seed)


def definition(runtime: Runtime, ids: list[int], first: int) -> tuple[float, bool]:
    rows = runtime.logits(ids).double().log_softmax(-1)
    places = range(first, len(ids))
    return sum(float(rows[i - 1][ids[i]]) for i in places), all(int(rows[i - 1].argmax()) == ids[i] for i in places)


def test_a_continuation_costs_what_the_logits_say(runtime: Runtime, seed: int) -> None:
    rng, likelihood = random.Random(seed), Likelihood(runtime)
    context = [1, *(rng.randrange(3, 250) for _ in range(90))]
    longer = [*context, *(rng.randrange(3, 250) for _ in range(20))]
    for front in (context, context, longer, context[:40], longer):
        behind = [rng.randrange(3, 250) for _ in range(rng.randint(1, 4))]
        nats, is_greedy = likelihood.of_continuation(front, behind)
        expected, expected_greedy = definition(runtime, [*front, *behind], len(front))
        assert nats == pytest.approx(expected, rel=1e-3) and is_greedy is expected_greedy is False


def test_a_greedy_continuation_is_known_as_one(runtime: Runtime) -> None:
    likelihood, context = Likelihood(runtime), runtime.tokenizer.encode_prompt("the value of")
    greedy = list(context)
    for _ in range(3):
        greedy.append(int(runtime.logits(greedy)[-1].argmax()))
    assert likelihood.of_continuation(context, greedy[len(context) :])[1] is True


def test_equal_contexts_are_read_once(runtime: Runtime) -> None:
    likelihood = Likelihood(runtime)
    with tiny_model.counting_feeds(runtime) as feeds:
        likelihood.of_continuation(range(3, 80), [5])
        likelihood.of_continuation(range(3, 80), [6])
        likelihood.of_continuation(range(3, 90), [7])
    assert feeds.calls == [(0, 77), (77, 87)]


def test_texts_are_split_where_the_context_ends(runtime: Runtime) -> None:
    likelihood = Likelihood(runtime)
    for context, continuation in (("the value", " of data"), ("the value ", "of data"), ("", "data"), ("the", "n")):
        front, behind = likelihood.encode(context, continuation)
        assert [*front, *behind] == runtime.tokenizer.encode_prompt(context + continuation) and behind
        assert front[0] == runtime.tokenizer.bos_id
    assert likelihood.encode("the value", " of data") == likelihood.encode("the value ", "of data")


def test_a_whole_text(runtime: Runtime) -> None:
    text = "the value of data is in the file " * 12
    ids = runtime.tokenizer.encode_prompt(text)
    assert Likelihood(runtime).of_text(text) == pytest.approx(definition(runtime, ids, 1)[0], rel=1e-4)
    assert Likelihood(runtime).of_text("") == 0


def test_completions_end_at_a_stop(runtime: Runtime) -> None:
    likelihood = Likelihood(runtime)
    whole = likelihood.complete("the value of", [], 12)
    assert whole
    stop = whole[len(whole) // 2]
    assert likelihood.complete("the value of", [stop, ""], 12) == whole[: whole.index(stop)]
