"""The `bench` command: as in cli, it parses, calls one function, hands the result to a view."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salalocal.cli_flags import ModelName, Quiet, with_flag_groups
from salalocal.errors import RequestError
from salalocal.settings import load_settings, parse_bytes, parse_tokens

if TYPE_CHECKING:
    from salalocal.bench.run import BenchOptions


@dataclass(frozen=True)
class BenchFlags:
    """Flags about what is measured, and where to."""

    ctx: Annotated[
        str | None, typer.Option(metavar="N,N", help="Depths to stop at, such as 64k,256k,1m; all in one read.")
    ] = None
    gen: Annotated[int, typer.Option(metavar="N", help="Tokens to draw in one run.")] = 128
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", metavar="N", help="Chunks and runs to time.")] = 3
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="dense: full attention in the shape of Qwen3-8B, beside it.")
    ] = None
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="NAME", help="md, json, jsonl or csv.")] = None
    json_: Annotated[bool, typer.Option("--json", help="The same as --output json.")] = False
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Draw it too, into a .svg or .png.")] = None
    project: Annotated[
        list[str] | None, typer.Option(metavar="CARD", help='Say what it would be on a card: "RTX 5090". Repeatable.')
    ] = None
    memory_cap: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Hold the card to less than it has, such as 8g.")
    ] = None

    def options(self) -> "BenchOptions":
        """What to measure. Raises: RequestError."""
        depths = tuple(parse_tokens(part) for part in self.ctx.split(",")) if self.ctx else ()
        cap = parse_bytes(self.memory_cap) if self.memory_cap else None
        from salalocal.bench.run import BenchOptions

        return BenchOptions(
            depths=depths,
            gen_tokens=self.gen,
            num_runs=self.repetitions,
            baseline=self.baseline,
            cards=tuple(self.project or ()),
            memory_cap_bytes=cap,
        )

    @property
    def form(self) -> str:
        """The format of the report. Raises: RequestError for one that is not known, or two."""
        from salalocal.terminal.bench_view import FORMATS

        form = self.output or ("json" if self.json_ else FORMATS[0])
        if form not in FORMATS:
            raise RequestError(f"--output {form[:40]!r} is not one of {', '.join(FORMATS)}", "--output md")
        if self.json_ and form != "json":
            raise RequestError(f"--json and --output {form} contradict", "leave one of them out")
        return form


@dataclass(frozen=True)
class EngineFlags:
    """Flags about the model and how it is run; all of them are settings too."""

    model: ModelName = None
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = None
    math: Annotated[str | None, typer.Option(metavar="NAME", help="Products on a card: int8, bf16 or fp8.")] = None
    kv_cache: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: bf16 or int8.")] = None
    kv_place: Annotated[str | None, typer.Option(metavar="NAME", help="Keys and values: on the card or host.")] = None
    chunk_size: Annotated[str | None, typer.Option(metavar="N", help="Tokens to read at a time.")] = None

    def settings(self) -> dict[str, Any]:
        """The flags by the names of settings."""
        return asdict(self)


@with_flag_groups
def bench(flags: BenchFlags, engine: EngineFlags, quiet: Quiet = False) -> None:
    """Measure how fast a model reads and writes at each depth.

    One read walks through all depths. At each it shows tokens read a second, seconds to the first token
    of an answer, tokens written a second, peak memory, and the share of what the machine could do, whose
    limits are measured in the same run.

    With no model at hand, a card is measured with random weights of the released shape.
    """
    options = flags.options()
    from salalocal.terminal.bench_plot import plot_bench
    from salalocal.terminal.bench_view import BenchView, bench_text
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.picture import check_picture

    form, settings, terminal = flags.form, load_settings(engine.settings()), make_terminal(quiet)
    if flags.plot is not None:
        check_picture(flags.plot)
    from salalocal.bench.run import run_bench

    with closing(BenchView(terminal)) as view:
        report = run_bench(settings, options, view.show, terminal.tell)
    terminal.write(bench_text(report, form, terminal.out.width if terminal.out.is_terminal else None))
    if flags.plot is not None:
        plot_bench(report).save(flags.plot)
        terminal.tell(f"plot: {flags.plot}")
    if report.is_interrupted:
        raise KeyboardInterrupt
    if report.results[0].failures:
        raise typer.Exit(3)
