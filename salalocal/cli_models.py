"""The commands about models on disk and this machine: as in cli, a command parses, calls one function, hands on."""

import shlex
from contextlib import closing
from typing import Annotated

import typer

from salalocal.cli_flags import Json, Quiet, known_models, write_json
from salalocal.settings import READERS, load_settings

models = typer.Typer()


Known = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A name as `salalocal ls` shows it, or a folder.", autocompletion=known_models
    ),
]


@models.command()
def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id: ORG/NAME or ORG/NAME@REVISION.")
    ] = "openbmb/MiniCPM-SALA",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="A branch, a tag or a commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be fetched.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no hub: check what is here.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model from the Hugging Face hub.

    It goes into the Hugging Face cache, where other programs find it too: safetensors, JSON and text,
    never code. Every file is held to its hash before it counts, files that are here already too. A pull
    that was stopped goes on where it was when the same command is given again.
    """
    from salalocal.session.pulling import PullRequest, pull_model
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.pull_view import PullView, pull_json, pull_lines

    terminal = make_terminal(quiet)
    with closing(PullView(terminal)) as view:
        report = pull_model(PullRequest(model, revision, dry_run, offline), view.show, terminal.tell)
    if json_:
        write_json(pull_json(report))
    else:
        terminal.write("".join(f"{line}\n" for line in pull_lines(report)))


@models.command(name="ls")
def list_(
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None,
    json_: Json = False,
) -> None:
    """List the models on this machine.

    The built-in one, those that quantize made, and the SALA models in the Hugging Face cache, with the
    longest context that fits into the memory that is free now.
    """
    from salalocal.device import device_memory, pick_device
    from salalocal.session.catalog import list_models, with_contexts
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.model_views import model_json, model_lines

    terminal = make_terminal()
    where = pick_device(load_settings({"device": device}).device)
    entries = with_contexts(list_models(), device_memory(where).free_bytes, where.type == "cuda")
    if json_:
        write_json({"models": [model_json(entry) for entry in entries]})
    else:
        terminal.write("".join(f"{line}\n" for line in model_lines(entries, terminal.out.width)))


@models.command()
def show(
    model: Known,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = None,
    json_: Json = False,
) -> None:
    """Show one model in full.

    Its shape, its tensors by scheme, its licence, what quantizing cost it, and the context that fits here.
    """
    from salalocal.session.showing import show_model
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.show_view import show_json, show_lines

    report = show_model(load_settings({"model": model, "device": device}))
    if json_:
        write_json(show_json(report))
    else:
        terminal = make_terminal()
        terminal.write("".join(f"{line}\n" for line in show_lines(report, terminal.out.width)))


@models.command()
def rm(
    model: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Names as `salalocal ls` shows them.", autocompletion=known_models),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Delete models from this machine.

    Of a model of the hub, every revision that is here. Asks before it does.
    """
    from salalocal.session.catalog import find_kept, remove_model
    from salalocal.terminal.confirm import confirm
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.model_views import removal_line

    terminal = make_terminal(quiet)
    entries = [find_kept(name) for name in dict.fromkeys(model)]
    for entry in entries:
        if not yes and not confirm(f"delete {removal_line(entry)}?", f"salalocal rm --yes {shlex.quote(entry.name)}"):
            terminal.tell("nothing deleted")
            raise typer.Exit(1)
    for entry in entries:
        remove_model(entry)
        terminal.tell(f"deleted {removal_line(entry)}")


@models.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hub.")] = False,
    json_: Json = False,
) -> None:
    """Look for what is amiss on this machine, with a fix.

    The card and its driver, packages, memory, disks, settings, the hub, and the model that chat takes. The
    exit code is 0 unless something is a problem; a missing card is none.
    """
    from salalocal.session.doctor import examine, worst_code
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.doctor_view import doctor_json, write_finding

    terminal = make_terminal()
    findings = []
    for finding in examine(offline):
        findings.append(finding)
        if not json_:
            write_finding(terminal, finding)
    if json_:
        write_json(doctor_json(findings))
    raise typer.Exit(worst_code(findings))


@models.command()
def config(json_: Json = False) -> None:
    """Show the settings in effect and where each comes from.

    Then the folders that are read and written.
    """
    from salalocal.terminal.console import make_terminal
    from salalocal.terminal.model_views import config_json, config_lines, places

    settings, names = load_settings({}), tuple(READERS)
    if json_:
        write_json(config_json(settings, places(), names))
    else:
        terminal = make_terminal()
        terminal.write("".join(f"{line}\n" for line in config_lines(settings, places(), names, terminal.out.width)))
