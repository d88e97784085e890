"""What the slash commands do to a session."""

from pathlib import Path

import pytest
from fake_view import FakeView
from tiny_model import make_pack

from salalocal.chat.commands import COMMANDS, Chat, run_command
from salalocal.chat.repl import run_chat
from salalocal.engine.sampling_params import SamplingParams
from salalocal.errors import PackError, RequestError
from salalocal.session.runtime import Runtime


@pytest.fixture
def chat(runtime: Runtime) -> Chat:
    session = runtime.session(
        pack=make_pack(one="alpha = 1\n" * 9, two="beta = 2\n"), sampling=SamplingParams(max_tokens=6)
    )
    return Chat(session, FakeView())


def view_of(chat: Chat) -> FakeView:
    assert isinstance(chat.view, FakeView)
    return chat.view


def paths(chat: Chat) -> list[str]:
    return [document.path for document in chat.session.pack or ()]


def test_help_names_every_command(chat: Chat) -> None:
    run_command(chat, "/help")
    names = [name.split()[0] for name, _ in view_of(chat).tables[0]]
    assert names[: len(COMMANDS)] == list(COMMANDS)
    assert set(COMMANDS) == {"/help", "/tokens", "/sources", "/undo", "/retry", "/add", "/drop", "/set", "/bye"}


def test_tokens(chat: Chat) -> None:
    run_command(chat, "/tokens")
    assert [document.path for document in view_of(chat).reports[0].documents] == ["one.txt", "two.txt"]


def test_sources(chat: Chat) -> None:
    with pytest.raises(RequestError, match="no answer"):
        run_command(chat, "/sources")
    run_chat(chat.session, FakeView("what?"))
    run_command(chat, "/sources")
    run_command(chat, "/sources 1")
    many, one = view_of(chat).sources
    assert many.num_tokens == one.num_tokens == 6 and len(one.sources) <= 1
    for line in ("/sources 0", "/sources x", "/sources -1", "/sources 1.5"):
        with pytest.raises(RequestError, match="from 1 on"):
            run_command(chat, line)


def test_undo_and_retry(chat: Chat) -> None:
    for line in ("/undo", "/retry"):
        with pytest.raises(RequestError):
            run_command(chat, line)
    run_chat(chat.session, FakeView("what?"))
    assert run_command(chat, "/retry") is False
    assert "greedy" in view_of(chat).told[0] and len(chat.session.turns) == 1
    run_command(chat, "/undo")
    assert chat.session.turns == () and view_of(chat).told[-1] == "took back: what?"


def test_add_and_drop(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("gamma\n")
    (tmp_path / "blob").write_bytes(bytes(99))
    run_command(chat, f"/add '{tmp_path / 'a b.txt'}'")
    assert paths(chat) == ["one.txt", "two.txt", "a b.txt"]
    assert view_of(chat).events, "what was added is read at once"
    assert view_of(chat).told[-1] == "documents added: 1"
    run_command(chat, '/drop one.txt "a b.txt"')
    assert paths(chat) == ["two.txt"]
    with pytest.raises(PackError):
        run_command(chat, f"/add {tmp_path / 'missing'}")
    with pytest.raises(PackError):
        run_command(chat, "/drop tow.txt")
    assert paths(chat) == ["two.txt"]


@pytest.mark.parametrize("line", ["/add", "/drop", "/add 'open", "/set foo 1", "/set temperature hot", "/set top_p 7"])
def test_wrong_arguments(chat: Chat, line: str) -> None:
    before = chat.sampling
    with pytest.raises(RequestError):
        run_command(chat, line)
    assert chat.sampling is before


def test_set(chat: Chat) -> None:
    run_command(chat, "/set")
    assert dict(view_of(chat).tables[0])["max_tokens"] == "6"
    for line in ("/set temperature 0.5", "/set --top-k=7", "/set seed 3", "/set max_tokens 2k"):
        run_command(chat, line)
    sampling = chat.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.5, 7, 3, 2048)
    run_command(chat, "/set seed none")
    assert chat.sampling.seed is None


def test_unknown_commands_take_one_line(chat: Chat) -> None:
    with pytest.raises(RequestError, match="did you mean /tokens") as caught:
        run_command(chat, "/token")
    assert caught.value.hint == "" and "\n" not in caught.value.message


def test_bye(chat: Chat) -> None:
    run_command(chat, "/bye")
    assert chat.is_over


def test_adding_standard_input_is_refused(chat: Chat) -> None:
    with pytest.raises(RequestError, match="standard input"):
        run_command(chat, "/add -")


def test_an_interrupted_add_changes_nothing(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = chat.session.pack
    monkeypatch.setattr("salalocal.chat.commands.read_sources", interrupted)
    assert run_command(chat, "/add somewhere") is True
    assert chat.session.pack is before
