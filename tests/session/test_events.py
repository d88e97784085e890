"""What the figures of a turn mean."""

from salalocal.session.events import Usage


def test_context_is_cached_and_new() -> None:
    usage = Usage(100, 80, 30, 10, 1.0, 2.0, 5)
    assert usage.new_tokens == 20 and usage.tokens_per_s == 15.0
    assert Usage(1, 0, 0, 0, 0.0, 0.0, 0).tokens_per_s == 0.0
