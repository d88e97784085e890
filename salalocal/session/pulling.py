"""Fetching a model by name: a hub id and wishes go in, what was fetched and where it is comes out; for `pull`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from salalocal.checkpoint.hub import is_builtin, is_hub_id, split_revision
from salalocal.checkpoint.hub_cache import CachedRepository, is_revision
from salalocal.checkpoint.hub_client import HubClient
from salalocal.checkpoint.hub_listing import Listing, read_listing
from salalocal.checkpoint.pull import PullPlan, PullProgress, check_pulled, plan_pull, run_pull
from salalocal.checkpoint.strict_json import one_line
from salalocal.errors import RequestError
from salalocal.prompt.sources.limits import size_text
from salalocal.session.plan import RELEASED_MODEL
from salalocal.session.start import Tell

_LEFT_OUT_SHOWN = 5


@dataclass(frozen=True)
class PullRequest:
    """What to fetch: ORG/NAME or ORG/NAME@REVISION.

    `is_dry_run` only says what would be done; `is_offline` asks no hub and checks what is here.
    """

    model: str = RELEASED_MODEL
    revision: str | None = None
    is_dry_run: bool = False
    is_offline: bool = False


@dataclass(frozen=True)
class PullReport:
    """What was done. `plan` is what there was to do, None where no hub was asked; `folder` None after a dry run."""

    listing: Listing
    revision: str
    folder: Path | None
    plan: PullPlan | None = None
    elapsed_s: float = 0.0

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came over the network, or would."""
        return self.plan.fetch_bytes if self.plan is not None else 0


def pull_model(request: PullRequest, on_progress: Callable[[PullProgress], None], tell: Tell) -> PullReport:
    """Fetch a model into the Hugging Face cache, or go on with it where an earlier pull stopped.

    Raises: RequestError, HubError, CheckpointError for what is no model or a disk that is full, BusyError.
    """
    hub_id, revision = _name(request)
    if request.is_offline:
        tell(f"model: {hub_id}, revision {revision}; no hub is asked")
        listing = check_pulled(hub_id, revision, on_progress)
        return PullReport(listing, revision, CachedRepository.of(hub_id).snapshot(listing.commit))
    client = HubClient.of_this_machine()
    client.on_wait = tell
    tell(f"model: {hub_id}, revision {revision}, from {client.endpoint}")
    listing = read_listing(client, hub_id, revision)
    tell(f"commit {listing.commit[:12]}: {len(listing.files)} files, {size_text(listing.num_bytes)}")
    _tell_left_out(listing, tell)
    plan = plan_pull(listing, revision)
    here = listing.num_bytes - plan.fetch_bytes
    if here:
        tell(f"{size_text(here)} of it are here already" + ("" if request.is_dry_run else " and are checked"))
    if request.is_dry_run:
        return PullReport(listing, revision, None, plan)
    last: list[PullProgress] = []

    def watch(progress: PullProgress) -> None:
        last[:] = [progress]
        on_progress(progress)

    try:
        run_pull(plan, client, watch)
    except (KeyboardInterrupt, SystemExit):
        tell("stopped: the same command goes on from here")
        raise
    folder = plan.repository.snapshot(listing.commit)
    return PullReport(listing, revision, folder, plan, last[0].elapsed_s if last else 0.0)


def _name(request: PullRequest) -> tuple[str, str]:
    if is_builtin(request.model):
        raise RequestError("the built-in model came with salalocal", "salalocal chat --model builtin --file PATH")
    hub_id, revision = split_revision(request.model)
    if not is_hub_id(hub_id):
        raise RequestError(
            f"'{one_line(request.model)}' is not a hub id", f"a hub id is ORG/NAME, such as {RELEASED_MODEL}"
        )
    revision = request.revision or revision
    if not is_revision(revision):
        raise RequestError(f"'{one_line(revision)}' is no revision", "name a branch, a tag or a commit")
    return hub_id, revision


def _tell_left_out(listing: Listing, tell: Tell) -> None:
    if listing.left_out:
        shown = ", ".join(f"'{one_line(name, 40)}'" for name in listing.left_out[:_LEFT_OUT_SHOWN])
        more = len(listing.left_out) - _LEFT_OUT_SHOWN
        tell(f"not fetched, since no model is made of them: {shown}" + (f" and {more:,} more" if more > 0 else ""))
