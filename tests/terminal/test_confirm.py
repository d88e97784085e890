"""Nothing is lost unless somebody says yes."""

import io
import sys

import pytest

from salalocal.errors import RequestError
from salalocal.terminal.confirm import confirm


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "is_yes"),
    [("y\n", True), ("YES\n", True), (" y \n", True), ("\n", False), ("", False), ("n\n", False), ("yeah\n", False)],
)
def test_only_yes_means_yes(
    typed: str, is_yes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard(typed))
    assert confirm("delete \x1b[2Jit?", "rm --yes") is is_yes
    captured = capsys.readouterr()
    assert captured.err == "delete \\x1b[2Jit? [y/N] " and captured.out == ""


def test_where_nobody_can_answer_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(RequestError, match="nobody can be asked") as caught:
        confirm("delete it?", "salalocal rm --yes x")
    assert caught.value.hint == "salalocal rm --yes x"
