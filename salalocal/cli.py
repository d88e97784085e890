"""The command line: a command parses, calls one function, hands the result to a view. Imports no torch at the top."""

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from salalocal import __version__
from salalocal.cli_bench import bench
from salalocal.cli_eval import evaluations
from salalocal.cli_flags import Json, ModelFlags, ModelName, Quiet, ReadFlags, with_flag_groups, write_json
from salalocal.cli_models import models
from salalocal.errors import RequestError
from salalocal.settings import load_settings, parse_bytes, parse_tokens, state_folder

app = typer.Typer(
    name="salalocal",
    help="Read a whole repository once, then ask: MiniCPM-SALA on your own machine.",
    epilog="A flag wins over its environment variable (SALALOCAL_MODEL, SALALOCAL_DEVICE, SALALOCAL_TEMPERATURE and "
    "so on), which wins over settings.toml in the user's configuration folder.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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
    from salalocal.session.usual_model import with_usual_model
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.question_input import open_questions

    terminal = make_terminal(quiet)
    settings = with_usual_model(load_settings(model.settings()), terminal.tell)
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
    from salalocal.session.usual_model import with_usual_model
    from salalocal.terminal.console import make_terminal

    terminal = make_terminal(quiet)
    settings = with_usual_model(load_settings(model.settings()), terminal.tell)
    questions = read_questions(question, from_, None if reading.is_stdin_taken else sys.stdin)
    opened = open_session(settings, reading.sources(), model.stop or (), terminal.tell)
    from salalocal.chat.questions import answer_questions
    from salalocal.terminal.chat_view import AnswerView
    from salalocal.terminal.tables import answers_json, tokens_json

    with closing(AnswerView(terminal, is_silent=json_)) as view:
        answers = list(answer_questions(opened.session, questions, view))
    if json_:
        answered = answers_json(answers, is_list=from_ is not None)
        write_json(answered | tokens_json(opened.token_report(), settings.model))
    if not answers or answers[-1].finish.reason == "cancelled":
        raise KeyboardInterrupt


@app.command()
@with_flag_groups
def tokens(reading: ReadFlags, model: ModelName = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Show how many tokens files take, what is skipped and why.

    Loads the tokenizer of the model, not the model.
    """
    from salalocal.session.start import report_sources
    from salalocal.session.usual_model import with_usual_tokenizer
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.tables import token_lines, tokens_json

    if not reading.file:
        raise RequestError("no file given", "salalocal tokens -f PATH")
    settings, terminal = with_usual_tokenizer(load_settings({"model": model})), make_terminal(quiet)
    report = report_sources(settings, reading.sources(), terminal.tell)
    if json_:
        write_json(tokens_json(report, settings.model))
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
    kv_place: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: on the card or host.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the memory that a model needs by context length.

    Reads only the shape of the model: works before any download or load.

    Exit code 3: the asked context does not fit; up to three commands that do fit are printed.
    """
    from salalocal.session.plan import PlanFlags, plan_model
    from salalocal.session.usual_model import with_usual_plan
    from salalocal.terminal.console import make_terminal, show_error
    from salalocal.terminal.tables import plan_json, plan_lines, plan_refusal

    settings, terminal = with_usual_plan(load_settings({"model": model})), make_terminal(quiet)
    flags = PlanFlags(
        parse_tokens(ctx) if ctx else None,
        parse_bytes(gpu_memory) if gpu_memory else None,
        weights,
        kv_cache,
        kv_place,
    )
    report = plan_model(settings, flags, terminal.tell)
    if json_:
        write_json(plan_json(report))
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
    from salalocal.session.quantizing import QuantizeRequest, quantize_model, usual_method
    from salalocal.session.start import Sources, model_choice
    from salalocal.session.usual_model import with_usual_original
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.eval_view import EvalView
    from salalocal.terminal.quantize_view import QuantizeView, card_json, card_lines

    terminal = make_terminal(quiet)
    settings = with_usual_original(load_settings({"model": model, "device": device}), terminal.tell)
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
        write_json(card_json(made))
    else:
        terminal.write("".join(f"{line}\n" for line in card_lines(made)))


app.command()(bench)
app.add_typer(models)
app.add_typer(evaluations, name="eval")


def main() -> None:
    """The `salalocal` command."""
    from salalocal.terminal.console import prepare_streams
    from salalocal.terminal.exits import run

    prepare_streams()
    sys.exit(run(app, sys.argv[1:]))
