"""The same seed says the same: run to run, after an interrupted read, and from a saved state, bit for bit."""

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import make_pack

from salalocal.engine.sampling_params import SamplingParams
from salalocal.model.state import ModelState
from salalocal.session.events import ReadProgress
from salalocal.session.runtime import Runtime
from salalocal.session.session import Session

PACK = {"one": "alpha = 1\n" * 12, "two": "beta = 2\n" * 16, "three": "gamma = 3\n" * 9}
QUESTION = "what is beta?"
SAMPLED = (
    SamplingParams(max_tokens=16, temperature=0.9, seed=11, is_loop_guarded=False),
    SamplingParams(max_tokens=16, temperature=1.2, top_p=0.9, top_k=40, min_p=0.01, seed=11, is_loop_guarded=False),
)
GREEDY = SamplingParams(max_tokens=16, is_loop_guarded=False)
# What a process says: the ids of an answer, drawn with a seed.
SAYING = """
import sys, tiny_model
from pathlib import Path
from salalocal.engine.sampling_params import SamplingParams
runtime = tiny_model.open_tiny_runtime(Path(sys.argv[1]), int(sys.argv[2]))
session = runtime.session(pack=tiny_model.make_pack(one="alpha = 1\\n" * 12))
list(session.ask("what is alpha?", SamplingParams(max_tokens=12, temperature=0.9, seed=3, is_loop_guarded=False)))
print(*session.turns[-1].answer_ids)
"""


def open_session(runtime: Runtime) -> Session:
    return runtime.session(pack=make_pack(**PACK))


def answer(session: Session, params: SamplingParams) -> tuple[int, ...]:
    for _ in session.ask(QUESTION, params):
        pass
    return session.turns[-1].answer_ids


def assert_same_bits(state: ModelState, other: ModelState) -> None:
    assert state.num_tokens == other.num_tokens
    for layer, its in zip(state.layers, other.layers, strict=True):
        tensors, others = layer.tensors(), its.tensors()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("params", [GREEDY, *SAMPLED], ids=["greedy", "drawn", "filtered"])
def test_the_same_seed_says_the_same(runtime: Runtime, params: SamplingParams) -> None:
    answers = {answer(open_session(runtime), params) for _ in range(3)}
    assert len(answers) == 1 and len(answers.pop()) == params.max_tokens


def test_another_seed_says_something_else(runtime: Runtime) -> None:
    seeds = range(8)
    answers = {answer(open_session(runtime), dataclasses.replace(SAMPLED[0], seed=seed)) for seed in seeds}
    assert len(answers) > 1


def test_processes_agree(tmp_path: Path, seed: int) -> None:
    said = set()
    for number in range(2):
        command = [sys.executable, "-c", SAYING, str(tmp_path / f"model-{number}"), str(seed)]
        environment = os.environ | {
            "PYTHONHASHSEED": str(number),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.add(done.stdout)
    assert len(said) == 1 and len(said.pop().split()) == 12


@pytest.mark.parametrize("params", [GREEDY, SAMPLED[1]], ids=["greedy", "filtered"])
@pytest.mark.parametrize("way", ["cancelled", "left"])
def test_an_interrupted_read_changes_nothing(runtime: Runtime, seed: int, way: str, params: SamplingParams) -> None:
    whole, stopped = open_session(runtime), open_session(runtime)
    expected = answer(whole, params)
    rng, num_events = random.Random(seed), sum(1 for _ in open_session(runtime).read())
    for stop_at in sorted(rng.sample(range(1, num_events), 2)):
        events = stopped.read()
        for event in events:
            if event.num_tokens >= stop_at * event.total_tokens // num_events:
                if way == "left":
                    events.close()  # type: ignore[attr-defined]
                    break
                stopped.cancel()
    questions = stopped.ask(QUESTION, params)
    first = next(questions)
    assert isinstance(first, ReadProgress) and first.cached_tokens > 0, "what was read before is not used"
    for _ in questions:
        pass
    assert stopped.turns[-1].answer_ids == expected


@pytest.mark.parametrize("params", SAMPLED, ids=["drawn", "filtered"])
def test_a_saved_state_goes_on_as_if_it_had_never_stopped(
    runtime: Runtime, tmp_path: Path, seed: int, params: SamplingParams
) -> None:
    engine, size = runtime.engine, runtime.engine.config.chunk_size
    vocab_size = engine.model.config.vocab_size
    ids = torch.randint(3, vocab_size, (5 * size + 7,), generator=torch.Generator().manual_seed(seed))
    expected_state = engine.new_state()
    expected_logits = engine.prefill(ids, expected_state)
    assert expected_logits is not None
    state = engine.new_state()
    for end in (2 * size, 4 * size, len(ids)):  # stopped, written and read back on the grid of chunks
        logits = engine.prefill(ids[state.num_tokens : end], state)
        state.save(tmp_path / "state.safetensors")
        state, _ = ModelState.load(tmp_path / "state.safetensors", engine.new_state())
    assert logits is not None and torch.equal(logits, expected_logits)
    assert_same_bits(state, expected_state)
    assert list(engine.generate(state, logits, params)) == list(engine.generate(expected_state, logits, params))


def test_a_fork_made_in_the_middle_of_an_answer_goes_on_as_it_does(runtime: Runtime, seed: int) -> None:
    engine, params = runtime.engine, SAMPLED[1]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, engine.model.config.vocab_size, (40,), generator=generator)
    state = engine.new_state()
    logits = engine.prefill(ids, state)
    assert logits is not None
    undisturbed = list(engine.generate(state.fork(), logits, params))
    answer_of_state = engine.generate(state, logits, params)
    begun = [next(answer_of_state) for _ in range(6)]
    fork = state.fork()  # holds all of them but the last
    assert [*begun, *answer_of_state] == undisturbed
    next_logits = engine.prefill(begun[-1:], fork)
    assert next_logits is not None
    rest = engine.generate(fork, next_logits, dataclasses.replace(params, max_tokens=params.max_tokens - 6))
    assert list(rest) == undisturbed[6:]
