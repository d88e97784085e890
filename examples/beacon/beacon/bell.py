"""Messages to people when a lamp goes dark."""

import json
import time
import urllib.request

MESSAGE_LIMIT = 280
WEBHOOK_TIMEOUT = 8
ESCALATION_EMAIL = "night-watch@beacon.example"


class BellError(RuntimeError):
    """The webhook did not take a message."""


class Bell:
    """Posts to a webhook, but not in the quiet hours and not too often."""

    def __init__(self, settings, clock=time.time):
        self.settings = settings
        self.clock = clock
        self.last_ring = None

    def ring(self, text):
        """Post a message unless it must wait; returns whether it was sent."""
        if self.is_quiet() or self.is_too_soon():
            return False
        self.post({"channel": self.settings.channel, "text": text[:MESSAGE_LIMIT]})
        self.last_ring = self.clock()
        return True

    def is_too_soon(self):
        """Whether the last message is younger than repeat_minutes."""
        return self.last_ring is not None and self.clock() - self.last_ring < 60 * self.settings.repeat_minutes

    def is_quiet(self):
        """Whether the clock is within quiet_hours."""
        if not self.settings.quiet_hours:
            return False
        start, _, end = self.settings.quiet_hours.partition("-")
        now = time.strftime("%H:%M", time.localtime(self.clock()))
        return now >= start or now < end if start > end else start <= now < end

    def post(self, message, timeout=WEBHOOK_TIMEOUT):
        """Send one message to the webhook."""
        request = urllib.request.Request(self.settings.webhook, json.dumps(message).encode())
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status >= 300:
                raise BellError(f"the webhook answered {answer.status}")
