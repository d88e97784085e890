"""The `eval` commands: as in cli, a command parses, calls one function, hands the result to a view."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from salalocal.cli_flags import Json, ModelName, Quiet, with_flag_groups, write_json
from salalocal.errors import RequestError
from salalocal.settings import Settings, load_settings, parse_tokens

if TYPE_CHECKING:
    from salalocal.evals.questionnaire import Place, Report, Watch
    from salalocal.session.start import Sources
    from salalocal.terminal.console import Terminal

evaluations = typer.Typer(
    help="Measure a model.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


Lengths = Annotated[str, typer.Option(metavar="N,N", help="Context lengths in tokens.")]
Samples = Annotated[int, typer.Option(metavar="N", help="Questions of a cell.")]
Text = Annotated[
    list[str] | None,
    typer.Option("--file", "-f", metavar="PATH", help="File, folder or archive to use; else shipped texts."),
]


@dataclass(frozen=True)
class StudyFlags:
    """Flags of every evaluation that keeps records: the model, and where the records go."""

    model: ModelName = None
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = None
    math: Annotated[str | None, typer.Option(metavar="NAME", help="Products on a card: int8, bf16 or fp8.")] = None
    kv_cache: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: bf16 or int8.")] = None
    kv_place: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: on the card or host.")] = None
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="Folder of the records; else among your data.")] = (
        None
    )
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget records of the same evaluation.")] = False

    def place(self) -> "Place":
        """Where the records go."""
        from salalocal.evals.questionnaire import Place

        return Place(self.out, self.fresh)


@dataclass(frozen=True)
class AnswerFlags:
    """Flags of every evaluation that asks questions."""

    seed: Annotated[int, typer.Option(metavar="N", help="The same seed asks the same questions.")] = 0
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest answer, thinking included.")] = None
    at_least: Annotated[
        float | None, typer.Option(metavar="X", help="Exit code 7 if fewer than this share is right, such as 0.9.")
    ] = None

    def check(self) -> None:
        """Refuse a share that is none."""
        if self.at_least is not None and not 0 <= self.at_least <= 1:
            raise RequestError(f"--at-least {self.at_least} should be from 0 to 1", "--at-least 0.9")


@dataclass(frozen=True)
class StreamFlags:
    """Flags of what goes to stdout and stderr."""

    json_: Json = False
    quiet: Quiet = False


@dataclass(frozen=True)
class GridFlags:
    """Flags of a grid of needles, beside its lengths."""

    depths: Annotated[int, typer.Option(metavar="N", help="Depths from 0 to 100 %.")] = 11
    samples: Samples = 2
    keys: Annotated[int, typer.Option(metavar="N", help="Needles planted; one of them is asked for.")] = 1
    form: Annotated[str, typer.Option(metavar="NAME", help="Form of a needle: constant or sentence.")] = "constant"


@evaluations.callback(invoke_without_command=True)
def _eval(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n\n")
        raise RequestError("no evaluation given", "salalocal eval needle --model MODEL")


@evaluations.command()
@with_flag_groups
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
    streams: StreamFlags,
) -> None:
    """Compare a quantized copy with its original.

    Both models read the same text, one after the other: perplexity of both, KL divergence of the copy
    from the original, and how often both find the same token likeliest.
    """
    num_tokens = (parse_tokens(ctx), parse_tokens(tokens))
    from salalocal.evals.comparison import DivergenceRequest, compare_by_name
    from salalocal.session.start import Sources
    from salalocal.session.usual_model import with_usual_original
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.eval_view import EvalView, divergence_lines

    terminal = make_terminal(streams.quiet)
    settings = with_usual_original(load_settings({"model": model, "device": device, "dtype": dtype}), terminal.tell)
    sources = Sources(tuple(file or ()), "path", stdin=sys.stdin.buffer)
    request = DivergenceRequest(against, sources, *num_tokens)
    with closing(EvalView(terminal)) as view:
        comparison = compare_by_name(settings, request, view.show, terminal.tell)
    if streams.json_:
        write_json(comparison.to_json())
    else:
        terminal.write("".join(f"{line}\n" for line in divergence_lines(comparison.to_json())))


@evaluations.command()
@with_flag_groups
def needle(
    *,
    ctx: Lengths = "4k,8k,16k",
    file: Text = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Heat map to write: .svg or .png.")] = None,
    grid: GridFlags,
    study: StudyFlags,
    answers: AnswerFlags,
    streams: StreamFlags,
) -> None:
    """Find planted lines, by length and depth.

    A line with an invented name and value is planted at each depth of a context of each length, and the
    model is asked for the value. The haystack is shipped text, or your files. A stopped run goes on where
    it was when the same command is given again.
    """
    lengths = _lengths(ctx)
    from salalocal.evals.needle import NeedleRequest, measure_needles
    from salalocal.terminal.heat_map import heat_map
    from salalocal.terminal.picture import check_picture
    from salalocal.terminal.study_view import needle_lines

    request = NeedleRequest(lengths, grid.depths, grid.samples, grid.keys, grid.form, answers.seed)
    if plot is not None:
        check_picture(plot)

    def measure(settings: Settings, watch: "Watch") -> "Report":
        report = measure_needles(settings, request, _sources(file), study.place(), watch)
        if plot is not None:
            heat_map(report).save(plot)
            watch.tell(f"heat map: {plot}")
        return report

    _ask_and_show(measure, needle_lines, _settings(study, answers), answers, streams)


@evaluations.command()
@with_flag_groups
def ruler(
    *,
    ctx: Lengths = "4k,8k,16k",
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME", help="Tasks to run; else all.")] = "",
    samples: Samples = 5,
    file: Text = None,
    study: StudyFlags,
    answers: AnswerFlags,
    streams: StreamFlags,
) -> None:
    """Run the task families of RULER, generated here.

    Tasks: single, multi-key, all-keys, multi-value, multi-query (needles), variable-tracing,
    common-words, frequent-words, files (questions about what the haystack's files say). A stopped run
    goes on where it was when the same command is given again.
    """
    lengths = _lengths(ctx)
    from salalocal.evals.ruler import RulerRequest, measure_ruler
    from salalocal.terminal.study_view import ruler_lines

    request = RulerRequest(lengths, _listed(tasks), samples, answers.seed)

    def measure(settings: Settings, watch: "Watch") -> "Report":
        return measure_ruler(settings, request, _sources(file), study.place(), watch)

    _ask_and_show(measure, ruler_lines, _settings(study, answers), answers, streams)


@evaluations.command()
@with_flag_groups
def mrcr(
    *,
    ctx: Lengths = "4k,8k,16k",
    needles: Annotated[str, typer.Option(metavar="N,N", help="How often the asked request comes.")] = "2,4,8",
    samples: Samples = 5,
    study: StudyFlags,
    answers: AnswerFlags,
    streams: StreamFlags,
) -> None:
    """Repeat one of several equal requests' answers.

    In a long conversation the same request comes 2, 4 or 8 times, each time with another answer; the
    model is to repeat, say, the second one word for word. A stopped run goes on where it was when the
    same command is given again.
    """
    lengths, counts = _lengths(ctx), tuple(_number("--needles", each) for each in _listed(needles))
    from salalocal.evals.mrcr import MrcrRequest, measure_mrcr
    from salalocal.terminal.study_view import mrcr_lines

    request = MrcrRequest(lengths, counts, samples, answers.seed)

    def measure(settings: Settings, watch: "Watch") -> "Report":
        return measure_mrcr(settings, request, study.place(), watch)

    _ask_and_show(measure, mrcr_lines, _settings(study, answers), answers, streams)


@evaluations.command()
@with_flag_groups
def recall(
    *,
    file: Text = None,
    questions: Annotated[int, typer.Option(metavar="N", help="Questions to ask, at most.")] = 50,
    ctx: Annotated[str | None, typer.Option(metavar="N", help="Longest context: 65536, 64k, 1m or auto.")] = None,
    study: StudyFlags,
    answers: AnswerFlags,
    streams: StreamFlags,
) -> None:
    """Ask what your files say, and check the answers.

    Reads the files once, as ask does, makes questions from them (values, settings, signatures, base
    classes, docstrings, lines of prose), asks each by itself and checks the answer against the file. A
    stopped run goes on where it was when the same command is given again.
    """
    if not file:
        raise RequestError("no file given", "salalocal eval recall -f PATH")
    from salalocal.evals.recall import RecallRequest, measure_recall
    from salalocal.terminal.study_view import recall_lines

    request = RecallRequest(questions, answers.seed)

    def measure(settings: Settings, watch: "Watch") -> "Report":
        return measure_recall(settings, request, _sources(file, "auto"), study.place(), watch)

    _ask_and_show(measure, recall_lines, _settings(study, answers, ctx), answers, streams)


@evaluations.command()
@with_flag_groups
def ppl(
    *,
    ctx: Annotated[str, typer.Option(metavar="N", help="Tokens of a context, at most.")] = "16k",
    stride: Annotated[
        str | None, typer.Option(metavar="N", help="Slide the context by N tokens and count only those.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens to count, at most.")] = None,
    file: Text = None,
    study: StudyFlags,
    streams: StreamFlags,
) -> None:
    """Measure the perplexity of a text.

    Reads each text from its start, as far as --ctx allows, and counts every token: in all, and by
    position in the context. With --stride, contexts overlap, so that every token but the first ones
    has at least --ctx less --stride tokens in front of it.
    """
    length, limits = parse_tokens(ctx), [None if text is None else parse_tokens(text) for text in (stride, tokens)]
    from salalocal.evals.perplexity import PerplexityRequest, measure_perplexity
    from salalocal.evals.questionnaire import Watch
    from salalocal.session.usual_model import with_usual_model
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.study_view import StudyView, perplexity_lines

    request = PerplexityRequest(length, *limits)
    terminal = make_terminal(streams.quiet)
    with _going_on(terminal), closing(StudyView(terminal)) as view:
        watch = Watch(view.show, terminal.tell)
        settings = with_usual_model(_settings(study), terminal.tell)
        report = measure_perplexity(settings, request, _sources(file), study.place(), watch)
    if streams.json_:
        write_json(report.to_json())
    else:
        terminal.write("".join(f"{line}\n" for line in perplexity_lines(report)))


def _ask_and_show(
    measure: "Callable[[Settings, Watch], Report]",
    lines: "Callable[[Report], Iterable[str]]",
    settings: Settings,
    answers: AnswerFlags,
    streams: StreamFlags,
) -> None:
    """Run an evaluation that asks, show its report, and end with code 7 if too few answers are right."""
    from salalocal.evals.questionnaire import Watch
    from salalocal.session.usual_model import with_usual_model
    from salalocal.terminal.console import make_terminal, show_error
    from salalocal.terminal.study_view import StudyView

    answers.check()
    terminal = make_terminal(streams.quiet)
    with _going_on(terminal), closing(StudyView(terminal)) as view:
        report = measure(with_usual_model(settings, terminal.tell), Watch(view.show, terminal.tell))
    if streams.json_:
        write_json(report.to_json())
    else:
        terminal.write("".join(f"{line}\n" for line in lines(report)))
    if answers.at_least is not None and report.total.share < answers.at_least:
        few = f"{100 * report.total.share:.1f} % right, --at-least asks for {100 * answers.at_least:.1f} %"
        show_error(few, [f"every answer stands in {report.folder / 'records.jsonl'}"])
        raise typer.Exit(7)


@contextmanager
def _going_on(terminal: "Terminal") -> Iterator[None]:
    """Say at Ctrl-C that nothing finished is lost."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.tell("stopped; the same command goes on from here")
        raise


def _settings(study: StudyFlags, answers: AnswerFlags | None = None, ctx: str | None = None) -> Settings:
    names = ("model", "device", "dtype", "math", "kv_cache", "kv_place")
    flags: dict[str, object] = {name: getattr(study, name) for name in names}
    return load_settings({**flags, "max_tokens": answers.max_tokens if answers is not None else None, "ctx": ctx})


def _sources(paths: list[str] | None, order: str = "path") -> "Sources":
    from salalocal.session.start import Sources

    return Sources(tuple(paths or ()), order, stdin=sys.stdin.buffer)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({parse_tokens(each) for each in _listed(text)}))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(",") if each.strip())


def _number(flag: str, text: str) -> int:
    if not text.isdecimal():
        raise RequestError(f"{flag}: {text[:40]!r} is not a whole number", f"{flag} 2,4,8")
    return int(text)
