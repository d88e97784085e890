"""Recorded picks on a CUDA device: those of a captured step against the modules', and the lines that they name."""

import random

import pytest
import torch
from tiny_model import document

from salalocal.checkpoint.checkpoint import Checkpoint
from salalocal.checkpoint.hub import find_model
from salalocal.engine.engine import Engine, EngineConfig
from salalocal.engine.fused.decoder import Decoder
from salalocal.engine.load import Placement, load_model
from salalocal.engine.picks import PickLog
from salalocal.engine.sampling import Sampler
from salalocal.engine.sampling_params import SamplingParams
from salalocal.evals.haystack import Haystack
from salalocal.prompt.pack import PromptPack
from salalocal.session.runtime import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
CUDA = torch.device("cuda")
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, seed=7, is_loop_guarded=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = load_model(Checkpoint.open(find_model("builtin")), CUDA, torch.bfloat16, Placement("int8"))
    made = Engine(model, EngineConfig(512, is_guessing=False))
    assert made._fused is not None
    return made


@pytest.mark.parametrize("num_tokens", [4_080, 9_000])
def test_the_picks_of_captured_steps_are_the_modules(engine: Engine, seed: int, num_tokens: int) -> None:
    """Random tokens: many blocks have nearly the same score, so most picks agree, not all."""
    ids = torch.randint(3, 8_000, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    state = engine.new_state(num_tokens + 128)
    logits = engine.prefill(ids, state)
    assert logits is not None and engine._fused is not None
    by_modules, forked, log = state.fork(), state.fork(), PickLog()
    decoder, tokens = Decoder(engine._fused, state, Sampler(SAMPLED), 40), [5]
    for _ in range(30):
        tokens.append(decoder.next_token(tokens[-1]))
    found = decoder.picks()
    for token in tokens[:30]:
        with torch.inference_mode():
            engine.model(torch.tensor([[token]], device=CUDA), by_modules)
        log.take(by_modules)
    expected = log.picks(by_modules, engine.model.config)
    first = max(4_095, num_tokens)
    assert found.positions.tolist() == expected.positions.tolist() == list(range(first, num_tokens + 30))
    same = [
        len(set(one.tolist()) & set(other.tolist())) / len(one)
        for one, other in zip(found.blocks.flatten(0, 2), expected.blocks.flatten(0, 2), strict=True)
    ]
    assert sorted(same)[len(same) // 2] > 0.9 and sum(same) / len(same) > 0.85
    is_same = found.blocks == expected.blocks
    is_free = is_same & found.weights.isfinite() & expected.weights.isfinite()
    assert is_free.any() and (found.weights - expected.weights)[is_free].abs().median() < 0.1

    other, again = Decoder(engine._fused, forked, Sampler(SAMPLED), 40), [5]
    forks = []
    for step in range(30):
        again.append(other.next_token(again[-1]))
        if step in (3, 17):
            forks.append(forked.fork())  # what is drawn belongs to the position, so a run made anew changes nothing
    assert again == tokens
    assert torch.equal(other.picks().blocks, found.blocks) and torch.equal(other.picks().weights, found.weights)


def test_planted_lines_are_named() -> None:
    runtime, chance = load("builtin", device="cuda"), random.Random(3)
    documents = list(Haystack.shipped(runtime.codec).stack(12_000, chance).documents)
    middle = len(documents) // 2
    rows = documents[middle].text.splitlines(keepends=True)
    place = len(rows) // 2
    rows.insert(place, "turnip_lattice_width = 7193\n")
    documents[middle] = document(documents[middle].path, "".join(rows))
    session = runtime.session(pack=PromptPack(tuple(documents)))
    list(session.ask("What is the value of turnip_lattice_width?"))
    assert "7193" in session.turns[-1].answer
    sources = session.sources(3).sources
    assert any(
        source.path == documents[middle].path and source.first_line <= place + 1 <= source.last_line
        for source in sources
    ), sources
