"""A git checkout -> how many of its latest commits touched each file; for the order of a pack.

The checkout may come from a stranger, so git is run such that no setting of it can start a program or reach the
network, for a short time, and through no shell. Without git, or when that fails, there are simply no counts.
"""

import os
import shutil
import subprocess
import threading
from collections import Counter

_MAX_COMMITS = 2_000
_MAX_OUTPUT_BYTES = 32 << 20
_TIMEOUT_S = 5.0
_COMMAND = (
    "-c core.fsmonitor=false -c protocol.allow=never"
    f" --no-pager log --max-count={_MAX_COMMITS} --no-merges --no-renames --no-show-signature --no-ext-diff"
    " --no-textconv --name-only --relative --format= -z"
).split()
_ENVIRONMENT = {
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "",
    "LC_ALL": "C",
}


def change_counts(folder: str) -> dict[str, int]:
    """Count for each file below a folder, by its path relative to it, the commits that touched it."""
    git = shutil.which("git")
    if git is None:
        return {}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | _ENVIRONMENT
    command = [git, "-C", folder, *_COMMAND]
    quiet = subprocess.DEVNULL
    try:
        with subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, env=environment) as process:
            timer = threading.Timer(_TIMEOUT_S, process.kill)
            timer.start()
            try:
                output = process.stdout.read(_MAX_OUTPUT_BYTES + 1) if process.stdout else b""
                if len(output) > _MAX_OUTPUT_BYTES:
                    process.kill()
                process.wait()
            finally:
                timer.cancel()
    except OSError:
        return {}
    if process.returncode != 0:
        return {}
    return dict(Counter(os.fsdecode(name) for name in output.split(b"\0") if name))
