"""What can stop a reader half-way; raised by the readers, answered in prompt/sources."""


class Fault(Exception):
    """Something in a source that ends its reading; the message is the reason, without the place."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Damage(Fault):
    """An archive or a compressed stream that is cut, altered or lies about itself."""


class LimitHit(Fault):
    """A cap of PackLimits was reached."""


class Changed(Fault):
    """A file shrank or was rewritten while it was read."""


class Refused(Fault):
    """One file or member that is not read; the others are not touched by it."""
