"""A chat template rendered where it can do no harm: template, messages and names come in, text goes out; for the
chat template.

A jinja sandbox keeps a template from Python's inner parts, but does not bound its time or memory. So a template of
somebody else is rendered in a child process with limits (`render_apart`): 2 s of CPU, 256 MiB, 8 MiB of text. This
file is also that child: it is run by its path and imports nothing of salalocal.

On Linux and macOS the limits are the system's (macOS does not hold the one on memory); on Windows only the text
and 10 s of clock time are bounded. One known template may be rendered by `render` directly: it is the caller's rule.
"""

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

MAX_CPU_S = 2
MAX_CLOCK_S = 10.0
MAX_MEMORY_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 8 * 2**20
_REFUSED = 3  # the child's exit status when its output is a reason


class RenderError(Exception):
    """A template that could not be rendered; the message says why and may quote the template."""


def render(template: str, variables: dict[str, Any]) -> str:
    """Render a template in this process, with the environment that Hugging Face templates expect.

    Raises: RenderError.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> NoReturn:
        raise jinja2.TemplateError(f"refused by the template: {message}")

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    pieces, num_bytes = [], 0
    try:
        for piece in environment.from_string(template).generate(variables):
            num_bytes += len(piece)
            if num_bytes > MAX_TEXT_BYTES:
                raise RenderError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
            pieces.append(piece)
    except jinja2.TemplateSyntaxError as error:
        raise RenderError(f"line {error.lineno}: {error.message}") from error
    except RenderError:
        raise
    except Exception as error:  # a template can make any operation fail
        raise RenderError(f"{type(error).__name__}: {error}") from error
    return "".join(pieces)


def render_apart(template: str, variables: dict[str, Any]) -> str:
    """Render a template in a child process with limits.

    Raises: RenderError, also when a limit is hit.
    """
    request = json.dumps({"path": [p for p in sys.path if p], "template": template, "variables": variables})
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=os.sep
        )
    except OSError as error:
        raise RenderError(f"no child process: {error.strerror}") from error
    with child:
        clock = threading.Timer(MAX_CLOCK_S, child.kill)
        clock.start()
        try:
            output = _exchange(child, request.encode())
        finally:
            clock.cancel()
            child.kill()
    if child.returncode == 0 and len(output) <= MAX_TEXT_BYTES:
        return output.decode("utf-8", "replace")
    if child.returncode == _REFUSED:
        raise RenderError(output[:1000].decode("utf-8", "replace"))
    limits = f"{MAX_CPU_S} s, {MAX_MEMORY_BYTES // 2**20} MiB, {MAX_TEXT_BYTES // 2**20} MiB of text"
    raise RenderError(f"stopped with status {child.returncode}; the limits are {limits}")


def _exchange(child: subprocess.Popen[bytes], request: bytes) -> bytes:
    if child.stdin is None or child.stdout is None:
        raise ValueError("the child needs both pipes")
    with suppress(BrokenPipeError):
        child.stdin.write(request)
    with suppress(BrokenPipeError):
        child.stdin.close()
    output = child.stdout.read(MAX_TEXT_BYTES + 1)
    child.stdout.close()
    child.wait()
    return output


def _limit_this_process() -> None:
    if sys.platform == "win32":
        return
    import resource

    limits = [
        (resource.RLIMIT_CPU, MAX_CPU_S),
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ]
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):
            continue  # macOS refuses a bound on memory below what it has mapped


def _main() -> int:
    request = json.loads(sys.stdin.buffer.read())
    sys.path[:] = request["path"]
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  both before the limits

    _limit_this_process()
    try:
        text, status = render(request["template"], request["variables"]), 0
    except RenderError as error:
        text, status = str(error), _REFUSED
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
    return status


if __name__ == "__main__":
    sys.exit(_main())
