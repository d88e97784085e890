"""Needles: what is planted and asked, that the key is nowhere else, and the built-in model finds them."""

import itertools
import random
from pathlib import Path

import pytest
import tiny_model
import tiny_tokenizer

from salalocal.errors import RequestError
from salalocal.evals.asking import Case
from salalocal.evals.haystack import Haystack
from salalocal.evals.needle import FORMS, NeedleRequest, measure_needles, needle_cases
from salalocal.evals.questionnaire import Place, Watch
from salalocal.session.start import Sources
from salalocal.session.tokens import TextCodec
from salalocal.settings import Settings


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.write_tokenizer(folder)
    return TextCodec.from_folder(folder)


def cases(codec: TextCodec, request: NeedleRequest) -> list[Case]:
    documents = [tiny_model.document(f"d{i}.txt", f"the value of data is {i}\n" * 5) for i in range(9)]
    return list(needle_cases(request, Haystack("made", documents, codec), codec))


def text_of(case: Case) -> str:
    pack = case.make().conversation.pack
    assert pack is not None
    return "".join(document.text for document in pack)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [1, 4])
def test_every_cell_asks_for_the_line_that_stands_at_its_depth(
    codec: TextCodec, form: str, keys: int, seed: int
) -> None:
    request = NeedleRequest((3000, 6000), depths=5, samples=2, keys=keys, form=form, seed=seed)
    made = cases(codec, request)
    assert len({case.key for case in made}) == len(made) == 2 * 5 * 2
    names = set()
    for case in made:
        question = case.make()
        turn, text = question.conversation.turns[-1].question, text_of(case)
        (value,) = question.expected
        (line,) = [line for line in text.splitlines() if value in line]
        before, after = FORMS[form].line.format(name="N", value="V").split("V")
        name = line.removesuffix(value + after).removeprefix(before.split("N")[0]).removesuffix(before.split("N")[1])
        assert turn == FORMS[form].question.format(name=name)
        assert text.count(name) == 1
        assert text.index(line) / (len(text) - len(line)) == pytest.approx(case.labels["depth"] / 100, abs=0.06)
        planted = [line for line in text.splitlines() if not line.startswith("the value of data")]
        assert len(planted) == keys
        segments = codec.template.render(question.conversation)
        assert 0.7 * case.labels["length"] < sum(len(s.ids) for s in segments) <= case.labels["length"] - 128
        others = [line for line in planted if line != case and value not in line]
        assert question.mark(f"it is {value}").is_right
        assert not question.mark("no idea").is_right
        for other in others:
            assert not question.mark(f"{line} {other}").is_right
        names.add(name)
    assert len(names) == len(made)


def test_equal_seeds_plant_equally(codec: TextCodec, seed: int) -> None:
    made = [
        [text_of(case) for case in cases(codec, NeedleRequest((2000,), 3, 1, seed=s))] for s in (seed, seed, seed + 1)
    ]
    assert made[0] == made[1] != made[2]


def test_depths_are_walked_from_the_deepest_up_and_share_their_beginning(codec: TextCodec, seed: int) -> None:
    made = cases(codec, NeedleRequest((6000,), 6, 1, keys=3, seed=seed))
    assert [case.labels["depth"] for case in made] == [100, 80, 60, 40, 20, 0]
    for deep, shallow in itertools.pairwise(made):
        one, other = text_of(deep), text_of(shallow)
        alike = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        assert alike / len(one) == pytest.approx(shallow.labels["depth"] / 100, abs=0.06)
    assert sum(case.cost_tokens for case in made) < 0.75 * 6 * 6000


def test_one_depth_is_the_middle() -> None:
    assert NeedleRequest((1024,), depths=1).shares == [0.5]


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--ctx", {"lengths": (100,)}),
        ("context", {"lengths": ()}),
        ("--depths", {"depths": 0}),
        ("--samples", {"samples": 0}),
        ("--keys", {"keys": 1001}),
        ("needle", {"form": "nail"}),
    ],
)
def test_what_makes_no_grid_is_refused(flag: str, values: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=flag):
        NeedleRequest(**{"lengths": (1024,), **values})  # type: ignore[arg-type]


def test_the_built_in_model_finds_needles(tmp_path: Path) -> None:
    settings = Settings(model="builtin", device="cpu")
    told: list[str] = []
    watch = Watch(lambda progress: None, told.append)
    request = NeedleRequest((1024,), depths=3, samples=1)
    report = measure_needles(settings, request, Sources(), Place(tmp_path), watch)
    assert (report.total.right, report.total.asked) == (3, 3), report.records
    again = measure_needles(settings, request, Sources(), Place(tmp_path), watch)
    assert again == report and "3 of 3 questions were answered before; --fresh asks anew" in told


def test_seeds_differ_in_every_question(codec: TextCodec) -> None:
    values = [
        case.make().expected
        for s in random.sample(range(1000), 4)
        for case in cases(codec, NeedleRequest((1500,), 2, 2, seed=s))
    ]
    assert len(set(values)) == len(values)
