"""The command line: a command parses, calls one function, hands the result to a view. Imports no torch at the top."""

import inspect
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salalocal import __version__
from salalocal.errors import RequestError
from salalocal.settings import load_settings, parse_bytes, parse_tokens, state_folder

if TYPE_CHECKING:
    from salalocal.session.start import Sources

app = typer.Typer(
    name="salalocal",
    help="Read a whole repository once, then ask: MiniCPM-SALA on your own machine.",
    epilog="A flag wins over its environment variable (SALALOCAL_MODEL, SALALOCAL_DEVICE, SALALOCAL_TEMPERATURE and "
    "so on), which wins over settings.toml in the user's configuration folder.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No narration and no progress on stderr.")]
ModelName = Annotated[str | None, typer.Option(metavar="MODEL", help="builtin, a model folder, or a hub id.")]
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


@app.callback(invoke_without_command=True)
def _salalocal(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"salalocal {__version__}\n")
    elif context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n\n")
        raise RequestError("no command given", "salalocal chat --file PATH")


@app.command()
@with_flag_groups
def chat(reading: ReadFlags, model: ModelFlags, quiet: Quiet = False) -> None:
    """Read files and chat about them.

    At a terminal, /help lists the commands of the chat. Ctrl-C stops an answer and keeps it, or pauses
    reading without loss; a second one, at the prompt, leaves. If stdin is not a terminal, every line of
    it is one question (or slash command), and the answers are all that stdout gets.
    """
    from salalocal.session.start import open_session
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.question_input import open_questions

    settings, terminal = load_settings(model.settings()), make_terminal(quiet)
    questions = open_questions(state_folder() / "chat_history", reading.is_stdin_taken)
    sources = reading.sources()
    opened = open_session(settings, sources, model.stop or (), terminal.tell)
    from salalocal.chat.repl import run_chat
    from salalocal.terminal.chat_view import TerminalChatView

    with closing(TerminalChatView(terminal, questions)) as view:
        code = run_chat(opened.session, view, sources.limits)
    raise typer.Exit(code)


@app.command()
@with_flag_groups
def ask(
    *,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="PATH", help="File with one question a line; all share one read.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    reading: ReadFlags,
    model: ModelFlags,
) -> None:
    """Answer a question about files and exit.

    stdout carries the answer and nothing else. Without QUESTION and --from, the question is read from
    stdin. Without --file the model answers from what it learned.
    """
    from salalocal.chat.question_list import read_questions
    from salalocal.session.start import open_session
    from salalocal.terminal.console import make_terminal

    settings, terminal = load_settings(model.settings()), make_terminal(quiet)
    questions = read_questions(question, from_, None if reading.is_stdin_taken else sys.stdin)
    opened = open_session(settings, reading.sources(), model.stop or (), terminal.tell)
    from salalocal.chat.questions import answer_questions
    from salalocal.terminal.chat_view import AnswerView
    from salalocal.terminal.tables import answers_json, tokens_json

    with closing(AnswerView(terminal, is_silent=json_)) as view:
        answers = list(answer_questions(opened.session, questions, view))
    if json_:
        answered = answers_json(answers, is_list=from_ is not None)
        _write_json(answered | tokens_json(opened.token_report(), settings.model))
    if not answers or answers[-1].finish.reason == "cancelled":
        raise KeyboardInterrupt


@app.command()
@with_flag_groups
def tokens(reading: ReadFlags, model: ModelName = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Show how many tokens files take, what is skipped and why.

    Loads the tokenizer of the model, not the model.
    """
    from salalocal.session.start import report_sources
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.tables import token_lines, tokens_json

    if not reading.file:
        raise RequestError("no file given", "salalocal tokens -f PATH")
    settings, terminal = load_settings({"model": model}), make_terminal(quiet)
    report = report_sources(settings, reading.sources(), terminal.tell)
    if json_:
        _write_json(tokens_json(report, settings.model))
    else:
        terminal.write("".join(f"{line}\n" for line in token_lines(report)))


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="builtin, a model folder, or a hub id.", show_default=False)
    ] = None,
    ctx: Annotated[str | None, typer.Option(metavar="N", help="Context to plan for: 65536, 64k, 1m.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the card, such as 16g; else what is free here.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="bf16, fp16, fp32, int8, int4, nf4 or fp4.")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(metavar="NAME", help="bf16, fp32 or int8.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the memory that a model needs by context length.

    Reads only the shape of the model: works before any download or load.

    Exit code 3: the asked context does not fit; up to three commands that do fit are printed.
    """
    from salalocal.session.plan import PlanFlags, plan_model
    from salalocal.terminal.console import make_terminal, show_error
    from salalocal.terminal.tables import plan_json, plan_lines, plan_refusal

    settings, terminal = load_settings({"model": model}), make_terminal(quiet)
    flags = PlanFlags(
        parse_tokens(ctx) if ctx else None, parse_bytes(gpu_memory) if gpu_memory else None, weights, kv_cache
    )
    report = plan_model(settings, flags, terminal.tell)
    if json_:
        _write_json(plan_json(report))
    else:
        terminal.write("".join(f"{line}\n" for line in plan_lines(report)))
    if not report.fits:
        show_error(plan_refusal(report), report.alternatives)
        raise typer.Exit(3)


@app.command()
def quantize(
    *,
    model: ModelName = None,
    bits: Annotated[int, typer.Option(metavar="N", help="4 or 8.")] = 4,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="gptq, rtn, nf4 or fp4; else gptq, on a CPU for small models.")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Weights that share a scale: 128, 64, 32 or less, or row; else 128, nf4 64."),
    ] = None,
    sensitive: Annotated[
        int | None, typer.Option(metavar="N", help="Bits of q, k and v of the sparse layers; else --bits.")
    ] = None,
    lm_head: Annotated[int, typer.Option(metavar="N", help="Bits of the output layer: 8, or 16 as it is.")] = 16,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="Folder to make; else among your data.")] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Text for gptq: file, folder or archive; else a shipped mix. Repeatable."),
    ] = None,
    calibration_tokens: Annotated[str, typer.Option(metavar="N", help="Most of its tokens to use.")] = "128k",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a 4-bit copy of a model.

    Reads and writes one layer at a time, so the model may be larger than memory. A run that was
    stopped goes on where it was when the same command is given again. What the copy has lost is
    measured at the end, on text that it was not calibrated on.
    """
    from salalocal.evals.comparison import measure_copy
    from salalocal.quant.recipe import QuantizeOptions, parse_group_size
    from salalocal.session.quantizing import QuantizeRequest, quantize_model, usual_method, with_usual_original
    from salalocal.session.start import Sources, model_choice
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.eval_view import EvalView
    from salalocal.terminal.quantize_view import QuantizeView, card_json, card_lines

    settings = with_usual_original(load_settings({"model": model, "device": device}))
    terminal = make_terminal(quiet)
    terminal.tell(model_choice(settings))
    method = method or usual_method(settings, terminal.tell)
    options = QuantizeOptions(
        method, bits, parse_group_size(group_size, method), bits if sensitive is None else sensitive, head_bits=lm_head
    )
    texts = Sources(tuple(calibration or ()), "path", stdin=sys.stdin.buffer)
    request = QuantizeRequest(options, out, texts, parse_tokens(calibration_tokens))
    with closing(QuantizeView(terminal)) as view, closing(EvalView(terminal)) as eval_view:
        measure = partial(measure_copy, settings, on_progress=eval_view.show, tell=terminal.tell)
        made = quantize_model(settings, request, view.show, terminal.tell, measure)
    if json_:
        _write_json(card_json(made))
    else:
        terminal.write("".join(f"{line}\n" for line in card_lines(made)))


evaluations = typer.Typer(
    help="Measure a model.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(evaluations, name="eval")


@evaluations.callback(invoke_without_command=True)
def _eval(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n\n")
        raise RequestError("no evaluation given", "salalocal eval divergence --model MODEL --against COPY")


@evaluations.command()
def divergence(
    *,
    model: ModelName = None,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The quantized copy.", show_default=False)],
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="PATH", help="Text to evaluate on; else a shipped one. Repeatable."),
    ] = None,
    ctx: Annotated[str, typer.Option(metavar="N", help="Tokens of a sequence, at most.")] = "16k",
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens in all, at most.")] = "32k",
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a quantized copy with its original.

    Both models read the same text, one after the other: perplexity of both, KL divergence of the copy
    from the original, and how often both find the same token likeliest.
    """
    from salalocal.evals.comparison import DivergenceRequest, compare_by_name
    from salalocal.session.quantizing import with_usual_original
    from salalocal.session.start import Sources
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.eval_view import EvalView, divergence_lines

    settings = with_usual_original(load_settings({"model": model, "device": device, "dtype": dtype}))
    terminal = make_terminal(quiet)
    sources = Sources(tuple(file or ()), "path", stdin=sys.stdin.buffer)
    request = DivergenceRequest(against, sources, parse_tokens(ctx), parse_tokens(tokens))
    with closing(EvalView(terminal)) as view:
        comparison = compare_by_name(settings, request, view.show, terminal.tell)
    if json_:
        _write_json(comparison.to_json())
    else:
        terminal.write("".join(f"{line}\n" for line in divergence_lines(comparison.to_json())))


def _write_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def main() -> None:
    """The `salalocal` command."""
    from salalocal.terminal.console import prepare_streams
    from salalocal.terminal.exits import run

    prepare_streams()
    sys.exit(run(app, sys.argv[1:]))
