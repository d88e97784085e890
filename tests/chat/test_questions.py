"""One-shot questions share one read and know nothing of each other."""

from fake_view import FakeView
from tiny_model import counting_feeds, make_pack

from salalocal.chat.questions import answer_questions
from salalocal.engine.sampling_params import SamplingParams
from salalocal.session.events import TextDelta
from salalocal.session.runtime import Runtime


def test_each_is_answered_as_if_it_were_alone(runtime: Runtime) -> None:
    pack, sampling = make_pack(one="alpha = 1\n" * 20), SamplingParams(max_tokens=6)
    session = runtime.session(pack=pack, sampling=sampling)
    with counting_feeds(runtime) as feeds:
        together = list(answer_questions(session, ["one?", "two?", "one?"], FakeView()))
    documents = session.token_report().document_tokens
    assert feeds.num_tokens < 2 * documents and session.turns == ()
    alone = [
        list(answer_questions(runtime.session(pack=pack, sampling=sampling), [q], FakeView())) for q in ("one?", "two?")
    ]
    assert [answer.text for answer in together] == [alone[0][0].text, alone[1][0].text, alone[0][0].text]
    assert [answer.question for answer in together] == ["one?", "two?", "one?"]
    assert [answer.sources for answer in together] == [alone[0][0].sources, alone[1][0].sources, alone[0][0].sources]
    assert all(source.path == "one.txt" for answer in together for source in answer.sources)
    assert together[0].finish.usage.cached_tokens == 0 < together[1].finish.usage.cached_tokens


def test_a_cancelled_answer_is_the_last(runtime: Runtime) -> None:
    session = runtime.session(sampling=SamplingParams(max_tokens=30))
    view = FakeView()
    view.on_event = lambda event: session.cancel() if isinstance(event, TextDelta) else None
    answers = list(answer_questions(session, ["one?", "two?"], view))
    assert [answer.finish.reason for answer in answers] == ["cancelled"]
    assert answers[0].text == view.text != ""
