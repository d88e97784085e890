"""The whole program at a (pseudo) terminal: echo, Ctrl-C while reading and answering, and what it may write there."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model

from salalocal.terminal.keyboard import EchoSwitch

SLOW_S = 60.0


class Screen:
    """A process at a terminal: type into it, wait for what it shows."""

    def __init__(self, arguments: list[str], state: Path) -> None:
        self._keys, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (30, 80))
        environ = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(state), "SALALOCAL_CHUNK_SIZE": "16"}
        environ.pop("NO_COLOR", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "salalocal", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environ,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        self._terminal = terminal
        self.shown = b""

    def wait_for(self, pattern: bytes, after: int = 0) -> int:
        """Wait until a pattern is shown behind a position; gives back where it ends."""
        deadline_s = time.monotonic() + SLOW_S
        while (match := re.compile(pattern, re.DOTALL).search(self.shown, after)) is None:
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {self.shown[-2000:]!r}"
            self._take(0.2)
        return match.end()

    def type(self, text: bytes) -> None:
        os.write(self._keys, text)

    def has_echo(self) -> bool:
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def exit_code(self) -> int:
        deadline_s = time.monotonic() + SLOW_S
        while self._process.poll() is None:
            assert time.monotonic() < deadline_s, f"does not end: {self.shown[-2000:]!r}"
            self._take(0.1)
        self._take(0.0)
        return self._process.returncode

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._terminal)
        os.close(self._keys)

    def _take(self, timeout_s: float) -> None:
        while select.select([self._keys], [], [], timeout_s)[0]:
            self.shown += os.read(self._keys, 65536)
            timeout_s = 0.0


def _take_terminal() -> None:
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def arguments(tmp_path: Path, seed: int) -> list[str]:
    """A document of some seconds of reading, and answers that go on for long."""
    tiny_model.write_tiny_model(tmp_path / "model", seed)
    (tmp_path / "notes.txt").write_text("the value of data is 5\n" * 300)
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    # The end tokens' logits are zero, so never among the likeliest 40; drawn at random, the answer does not loop.
    drawing = ["--max-tokens", "7000", "--temperature", "3", "--top-k", "40"]
    return ["-f", str(tmp_path / "notes.txt"), *model, *drawing]


@pytest.fixture
def screens(tmp_path: Path) -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


def test_ctrl_c_in_a_chat(arguments: list[str], screens: list[Screen], tmp_path: Path) -> None:
    screen = Screen(["chat", *arguments], tmp_path)
    screens.append(screen)
    screen.wait_for(rb"tok/s")
    assert not screen.has_echo()
    screen.type(b"\x03")
    at = screen.wait_for(rb"paused at [0-9,]+ of [0-9,]+ tokens")
    at = screen.wait_for(rb">>>", screen.wait_for(rb"nothing is lost", at))
    screen.type(b"what?\r")
    at = screen.wait_for(rb"read 1 file: .*more were read before", at)
    time.sleep(0.5)
    pressed_s = time.monotonic()
    screen.type(b"\x03")
    at = screen.wait_for(rb"stopped by Ctrl-C", at)
    assert time.monotonic() - pressed_s < 2.0
    at = screen.wait_for(rb">>>", at)
    screen.type(b"/undo\r")
    at = screen.wait_for(rb"took back: what\?", at)
    at = screen.wait_for(rb">>>", at)
    screen.type(b"\x03")
    at = screen.wait_for(rb"once more leaves", at)
    at = screen.wait_for(rb">>>", at)
    screen.type(b"\x03")
    assert screen.exit_code() == 130
    assert screen.has_echo()
    assert not re.search(rb"[\x00-\x06\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", screen.shown), (
        "a control character of the model"
    )


def test_ctrl_c_in_ask_keeps_what_was_said(arguments: list[str], screens: list[Screen], tmp_path: Path) -> None:
    screen = Screen(["ask", *arguments, "what?"], tmp_path)
    screens.append(screen)
    screen.wait_for(rb"read 1 file: ")
    time.sleep(0.5)
    screen.type(b"\x03")
    screen.wait_for(rb"stopped by Ctrl-C")
    assert screen.exit_code() == 130
    assert b"Traceback" not in screen.shown and b"error" not in screen.shown


def test_two_ctrl_c_leave_at_once_and_the_terminal_is_as_before(
    arguments: list[str], screens: list[Screen], tmp_path: Path
) -> None:
    screen = Screen(["chat", *arguments], tmp_path)
    screens.append(screen)
    screen.wait_for(rb"tok/s")
    screen.type(b"\x03")
    time.sleep(0.05)
    screen.type(b"\x03")
    assert screen.exit_code() == 130
    assert screen.has_echo() and b"Traceback" not in screen.shown


def test_without_a_terminal_there_is_no_echo_to_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        switch = EchoSwitch()
        switch.restore()
        switch.restore()


def test_sigterm_gives_the_terminal_back(arguments: list[str], screens: list[Screen], tmp_path: Path) -> None:
    screen = Screen(["chat", *arguments], tmp_path)
    screens.append(screen)
    screen.wait_for(rb"tok/s")
    screen._process.send_signal(signal.SIGTERM)
    assert screen.exit_code() == 143
    assert screen.has_echo() and b"Traceback" not in screen.shown
