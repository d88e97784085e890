"""What the commands share: flags that several of them take, groups of flags, JSON on stdout; for cli and cli_eval."""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salalocal.settings import parse_bytes

if TYPE_CHECKING:
    from salalocal.session.start import Sources


def known_models(incomplete: str) -> list[str]:
    """The models on this machine whose names begin so, for shell completion."""
    from salalocal.session.catalog import model_names

    return [name for name in model_names() if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No narration and no progress on stderr.")]
ModelName = Annotated[
    str | None,
    # Named, since typer 0.27 takes a metavar that spells the parameter for its flag.
    typer.Option("--model", metavar="MODEL", help="builtin, a model folder, or a hub id.", autocompletion=known_models),
]
File = Annotated[
    list[str] | None,
    typer.Option("--file", "-f", metavar="PATH", help="File, folder or archive to read; - is stdin. Repeatable."),
]


@dataclass(frozen=True)
class ModelFlags:
    """Flags about the model and how answers are drawn; all of them are settings too, but --stop."""

    model: ModelName = None
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = None
    math: Annotated[str | None, typer.Option(metavar="NAME", help="Products on a card: int8, bf16 or fp8.")] = None
    kv_cache: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: bf16 or int8.")] = None
    kv_place: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: on the card or host.")] = None
    guess: Annotated[
        bool | None, typer.Option("--guess/--no-guess", help="Guess, on a card, what an answer copies from the text.")
    ] = None
    ctx: Annotated[str | None, typer.Option(metavar="N", help="Longest context: 65536, 64k, 1m or auto.")] = None
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System text before the documents.")] = None
    temperature: Annotated[float | None, typer.Option(metavar="X", help="0: always the likeliest token.")] = None
    top_p: Annotated[float | None, typer.Option(metavar="X", help="Draw from the likeliest that sum to X.")] = None
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw from the N likeliest tokens.")] = None
    min_p: Annotated[float | None, typer.Option(metavar="X", help="Drop tokens below X times the likeliest.")] = None
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest answer, thinking included.")] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same answer.")] = None
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before TEXT. Repeatable.")] = None

    def settings(self) -> dict[str, Any]:
        """The flags that settings know, None where one was not given."""
        return {name: value for name, value in asdict(self).items() if name != "stop"}


@dataclass(frozen=True)
class ReadFlags:
    """Flags about the files: which, in what order, and the caps on them."""

    file: File = None
    order: Annotated[str, typer.Option(metavar="NAME", help="auto, git, path, mtime or given.")] = "auto"
    partial: Annotated[bool, typer.Option("--partial", help="Keep what is whole of a damaged archive.")] = False
    depth: Annotated[int, typer.Option(metavar="N", help="Levels of archives to open.")] = 1
    max_member: Annotated[str, typer.Option(metavar="SIZE", help="Largest file.")] = "64m"
    max_total: Annotated[str, typer.Option(metavar="SIZE", help="Most bytes to unpack.")] = "2g"
    max_text: Annotated[str, typer.Option(metavar="SIZE", help="Most text to keep.")] = "64m"
    max_members: Annotated[int, typer.Option(metavar="N", help="Most files to look at.")] = 100_000
    max_name: Annotated[int, typer.Option(metavar="N", help="Longest name, in bytes.")] = 1_024
    max_path_depth: Annotated[int, typer.Option(metavar="N", help="Deepest folder.")] = 64
    max_read_seconds: Annotated[float, typer.Option(metavar="X", help="Most CPU time for reading.")] = 60.0

    def sources(self) -> "Sources":
        """What to read, for salalocal.session.start."""
        from salalocal.prompt.sources import PackLimits
        from salalocal.session.start import Sources

        limits = PackLimits(
            max_member_bytes=parse_bytes(self.max_member),
            max_total_bytes=parse_bytes(self.max_total),
            max_text_bytes=parse_bytes(self.max_text),
            max_members=self.max_members,
            max_name_bytes=self.max_name,
            max_path_depth=self.max_path_depth,
            archive_depth=self.depth,
            max_cpu_s=self.max_read_seconds,
            partial=self.partial,
        )
        return Sources(tuple(self.file or ()), self.order, limits, sys.stdin.buffer)

    @property
    def is_stdin_taken(self) -> bool:
        """True if stdin is a document."""
        return "-" in (self.file or ())


def with_flag_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of flags: a parameter whose type is a dataclass becomes one flag for each field."""
    signature = inspect.signature(command)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        members = fields(groups[name]) if name in groups else ()
        parameters += [
            inspect.Parameter(
                member.name, inspect.Parameter.KEYWORD_ONLY, default=member.default, annotation=member.type
            )
            for member in members
        ]
        if not members:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def expanded(**values: Any) -> None:
        grouped = {
            name: group(**{member.name: values.pop(member.name) for member in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **grouped)

    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def write_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
