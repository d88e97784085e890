"""Sampling: every filter against its definition, exactly and by counting draws; the guard against endless loops."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from salalocal.engine.sampling import RepetitionGuard, Sampler, check_finite, token_probabilities
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import NumericError, RequestError


def logits_of(probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def definition(logits: list[float], params: SamplingParams) -> list[float]:
    """The filters in plain Python, straight from the module's text."""
    peak = max(logits)
    weights = [math.exp((value - peak) / params.temperature) for value in logits]
    total = sum(weights)
    p = {token: weight / total for token, weight in enumerate(weights)}
    ranking = sorted(p, key=lambda token: (-p[token], token))
    if params.top_k:
        ranking = ranking[: params.top_k]
    total = sum(p[token] for token in ranking)
    kept, reached = [], 0.0
    for token in ranking:
        if reached >= params.top_p * total and params.top_p < 1:
            break
        kept.append(token)
        reached += p[token]
    kept = [token for token in kept if p[token] >= params.min_p * p[ranking[0]]]
    total = sum(p[token] for token in kept)
    return [p[token] / total if token in kept else 0.0 for token in range(len(logits))]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 12),
    min_p=st.floats(0, 1),
)


@given(st.lists(st.integers(-80, 80).map(lambda value: value / 10), min_size=1, max_size=10), PARAMS)
def test_all_filters_together_are_their_definition(values: list[float], params: SamplingParams) -> None:
    found = token_probabilities(torch.tensor(values, dtype=torch.float64), params)
    expected = definition(values, params)
    assert found.dtype == torch.float64 and abs(float(found.sum()) - 1) < 1e-12
    if max(abs(a - b) for a, b in zip(found.tolist(), expected, strict=True)) > 1e-9:
        # Only a threshold that falls on a token to the last bit may be decided either way.
        nearby = [
            definition(
                values, SamplingParams(params.temperature, min(1.0, params.top_p * f), params.top_k, params.min_p * g)
            )
            for f in (1 - 1e-12, 1 + 1e-12)
            for g in (1 - 1e-12, min(1 + 1e-12, 1 / params.min_p if params.min_p else 1))
        ]
        assert any(max(abs(a - b) for a, b in zip(found.tolist(), n, strict=True)) < 1e-9 for n in nearby)


def kept(probabilities: list[float], **params: Any) -> list[int]:
    found = token_probabilities(logits_of(probabilities), SamplingParams(temperature=1.0, **params))
    return [token for token, probability in enumerate(found.tolist()) if probability > 0]


def test_each_filter_cuts_where_its_definition_says() -> None:
    p = [0.1, 0.4, 0.2, 0.05, 0.25]
    assert kept(p) == [0, 1, 2, 3, 4]
    assert kept(p, top_k=1) == [1]
    assert kept(p, top_k=3) == [1, 2, 4]
    assert kept(p, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(p, top_p=0.39) == [1]
    assert kept(p, top_p=0.41) == [1, 4]
    assert kept(p, top_p=0.66) == [1, 2, 4]
    assert kept(p, top_p=0.9999) == [0, 1, 2, 3, 4]
    assert kept(p, top_p=1e-9) == [1]
    assert kept(p, min_p=0.49) == [1, 2, 4]
    assert kept(p, min_p=0.51) == [1, 4]
    assert kept(p, min_p=1.0) == [1]
    # On what top_k left (0.4, 0.25 of 0.65), 0.6 is reached by the first alone; on all of them it would take two.
    assert kept(p, top_k=2, top_p=0.6) == [1]
    assert kept(p, top_p=0.6) == [1, 4]


def test_ties_go_to_the_lower_id() -> None:
    even = [0.25, 0.25, 0.25, 0.25]
    assert kept(even, top_k=2) == [0, 1]
    assert kept(even, top_p=0.5) == [0, 1]
    assert kept([0.2, 0.3, 0.2, 0.3], top_k=3) == [0, 1, 3]
    assert kept(even, min_p=1.0) == [0, 1, 2, 3]
    logits = torch.zeros(70_000)
    logits[[60_000, 123, 69_999]] = 4.0
    for values in (logits, logits.half(), logits.bfloat16(), logits.double()):
        assert Sampler(SamplingParams()).sample(values, 0) == 123


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.05, 0.25]),
        ({"temperature": 0.5}, [p**2 / 0.275 for p in (0.1, 0.4, 0.2, 0.05, 0.25)]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0.4 / 0.65, 0, 0, 0.25 / 0.65]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 0.4 / 0.85, 0.2 / 0.85, 0, 0.25 / 0.85]),
        ({"temperature": 1.0, "min_p": 0.4}, [0, 0.4 / 0.85, 0.2 / 0.85, 0, 0.25 / 0.85]),
    ],
)
def test_draws_come_as_often_as_they_should(params: dict[str, Any], expected: list[float], seed: int) -> None:
    num_draws = 4000
    sampler = Sampler(SamplingParams(**params, seed=seed))
    counts = torch.zeros(5)
    logits = logits_of([0.1, 0.4, 0.2, 0.05, 0.25])
    for position in range(num_draws):
        counts[sampler.sample(logits, position)] += 1
    wanted = torch.tensor(expected)
    assert counts[wanted == 0].sum() == 0
    chi_squared = ((counts - num_draws * wanted) ** 2 / (num_draws * wanted))[wanted > 0].sum()
    assert chi_squared < 40  # 4 degrees of freedom: one run in 10^7


def test_one_seed_gives_one_text_and_another_another(seed: int) -> None:
    logits = torch.randn(200, generator=torch.Generator().manual_seed(seed))

    def draw(number: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=number))
        return [sampler.sample(logits, position) for position in range(40)]

    assert draw(seed) == draw(seed)
    assert draw(seed) != draw(seed + 1)
    assert draw(None) != draw(None)


def test_a_random_number_belongs_to_its_position(seed: int) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
    numbers = sampler.uniforms(0, 200)
    assert numbers.min() >= 0 and numbers.max() < 1 and len(numbers.unique()) == 200
    for first, count in ((0, 1), (1, 3), (7, 50), (196, 4)):
        assert torch.equal(sampler.uniforms(first, count), numbers[first : first + count])
    far = 2**40 + 3
    assert torch.equal(sampler.uniforms(far, 9)[5:], Sampler(sampler.params).uniforms(far + 5, 4))
    assert abs(float(sampler.uniforms(0, 20_000).mean()) - 0.5) < 0.02


def test_drawing_leaves_the_logits_and_the_global_generator_alone(seed: int) -> None:
    logits = torch.randn(50)
    before, generator = logits.clone(), torch.random.get_rng_state()
    Sampler(SamplingParams(temperature=0.7, top_p=0.9, top_k=7, min_p=0.1, seed=seed)).sample(logits, 3)
    assert torch.equal(logits, before) and torch.equal(torch.random.get_rng_state(), generator)


def test_extreme_temperatures_are_greedy_and_even() -> None:
    logits = torch.tensor([0.0, 50.0, 49.0, -1e30])
    assert Sampler(SamplingParams(temperature=1e-300, seed=1)).sample(logits, 0) == 1
    assert kept([0.5, 0.5]) == [0, 1]
    spread = token_probabilities(torch.tensor([1.0, -1.0]), SamplingParams(temperature=100))
    assert abs(float(spread[0]) - 0.505) < 1e-3


def test_a_token_that_no_one_may_draw_is_never_drawn() -> None:
    logits = torch.tensor([-1e30, 0.0, -1e30])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    assert {sampler.sample(logits, position) for position in range(50)} == {1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0)])
def test_nan_and_infinity_are_refused(bad: float, params: SamplingParams) -> None:
    logits = torch.zeros(10)
    logits[7] = bad
    with pytest.raises(NumericError, match="logits: 1 of 10 numbers"):
        Sampler(params).sample(logits, 0)


def test_large_finite_numbers_are_finite() -> None:
    check_finite(torch.full((1000,), 3e38), "x")
    check_finite(torch.tensor([1e38, -1e38]).bfloat16(), "x")
    check_finite(torch.full((70_000,), 65504.0, dtype=torch.float16), "x")
    with pytest.raises(NumericError, match="x: 2 of 3"):
        check_finite(torch.tensor([math.inf, -math.inf, 1]), "x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 101),
        ("temperature", "1"), ("temperature", None), ("temperature", True),
        ("top_p", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", -1), ("top_p", math.nan), ("top_p", []),
        ("top_k", -1), ("top_k", 1.5), ("top_k", True), ("top_k", 2**31), ("top_k", "5"), ("top_k", None),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan), ("min_p", 1e308),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10.0), ("max_tokens", 2**31), ("max_tokens", None),
        ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", "x" * 10_000),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_sense_is_named(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{field} should be") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert len(caught.value.message) < 150


def test_the_edges_of_every_field_are_allowed() -> None:
    SamplingParams(0, 1, 0, 0, 1, 0)
    SamplingParams(100.0, 1e-300, 2**31 - 1, 1, 2**31 - 1, 2**63 - 1)


def fires_at(tokens: list[int]) -> int | None:
    guard = RepetitionGuard()
    for place, token in enumerate(tokens, 1):
        if guard.push(token):
            return place
    return None


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 31, 63, 64, 65, 100, 255, 256])
def test_a_loop_is_noticed_as_soon_as_the_rule_says(cycle: int, seed: int) -> None:
    random.seed(seed)
    start = [random.randrange(1000, 9000) for _ in range(random.randrange(300))]
    loop = random.sample(range(900), cycle)
    num_loops = 300 // cycle + 5
    assert fires_at(start + loop * num_loops) == len(start) + max(256, 4 * cycle)
    assert RepetitionGuard(start + loop * num_loops).is_looping
    assert not RepetitionGuard(start + loop * num_loops + [99_999]).is_looping


def test_a_cycle_longer_than_the_limit_is_let_go(seed: int) -> None:
    random.seed(seed)
    assert fires_at(random.sample(range(9000), 257) * 20) is None


def encoded(text: str) -> list[int]:
    """One token a word or sign, which repeats more than any real tokenizer's tokens do."""
    import re

    words: dict[str, int] = {}
    return [words.setdefault(word, len(words)) for word in re.findall(r"\w+|\W", text)]


ORDINARY = {
    "a numbered list": "".join(f"{n}. Check the value of option {n} and write it down.\n" for n in range(1, 200)),
    "a table": "".join(f"| item {n:03} | 0 | 0 | 0 | 0 | 0 | yes | no |\n" for n in range(300)),
    "an empty table": "| name | value |\n|---|---|\n" + "|   |   |\n" * 20,
    "a ruler": "title\n" + "=" * 120 + "\n" + "-" * 120 + "\n",
    "zeros": "int table[64] = {" + "0, " * 64 + "};",
    "code": "".join(f"    self.field_{n} = field_{n}\n    self.other_{n} = None\n" for n in range(200)),
    "a log": "".join(f"12:00:{n % 60:02} INFO worker {n} started, 0 errors, 0 warnings\n" for n in range(300)),
    "a poem with a refrain": ("la la la la, " * 4 + "and so it goes\n") * 3,
    "lines said ten times": "I will not waste chalk.\n" * 10,
    "csv": "".join(f"{n},0,0,0,0\n" for n in range(500)),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_repetition_is_left_alone(kind: str) -> None:
    assert fires_at(encoded(ORDINARY[kind])) is None


def test_the_loops_of_a_stuck_model_are_noticed() -> None:
    for loop in (
        "I don't know. ",
        "\n",
        "The answer is 42. Wait, let me check that again.\n\nThe value in config.py is 42. ",
        "0 ",
    ):
        assert fires_at(encoded("The answer: " + loop * 500)) is not None


def test_a_guard_does_not_see_across_a_break() -> None:
    loop = list(range(64))
    assert fires_at((loop * 3 + [999]) * 3) is None
