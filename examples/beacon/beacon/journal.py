"""The store of pulses: one file of JSON lines for each day."""

import json
import time
from dataclasses import asdict
from pathlib import Path

SECONDS_PER_DAY = 86_400
SEGMENT_SUFFIX = ".pulses"
FLUSH_EVERY = 200


class Journal:
    """Appends pulses and forgets old days."""

    def __init__(self, settings, clock=time.time):
        self.directory = Path(settings.directory)
        self.keep_days = settings.keep_days
        self.clock = clock
        self.pending = []

    def append(self, pulse):
        """Keep a pulse; it reaches the disk with the next flush."""
        self.pending.append(json.dumps(asdict(pulse)))
        if len(self.pending) >= FLUSH_EVERY:
            self.flush()

    def flush(self):
        """Write what is pending to today's segment."""
        if not self.pending:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.segment_path(self.clock()).open("a") as segment:
            segment.write("\n".join(self.pending) + "\n")
        self.pending.clear()

    def segment_path(self, moment):
        """The file for the day of a moment."""
        return self.directory / (time.strftime("%Y-%m-%d", time.gmtime(moment)) + SEGMENT_SUFFIX)

    def forget_old(self):
        """Delete segments older than keep_days; returns how many."""
        limit = self.clock() - self.keep_days * SECONDS_PER_DAY
        old = [path for path in self.directory.glob("*" + SEGMENT_SUFFIX) if path.stat().st_mtime < limit]
        for path in old:
            path.unlink()
        return len(old)
