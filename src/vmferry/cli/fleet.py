"""Asking the configured hosts in parallel: who has this VM, this migration; and what all of them have.

For the nouns of `vmferry.cli`. A host that does not answer is said on stderr; it is an error only where the answer
may be there and nowhere else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vmferry.api.client import HostClient
from vmferry.api.endpoints import LOCAL_NAME, Endpoint, find_endpoints
from vmferry.cli.display import print_warning
from vmferry.cli.session import Session
from vmferry.model.errors import Conflict, NotFound, Unreachable, VmferryError, WrongInput
from vmferry.model.migration import MigrationView, Outcome, Role
from vmferry.model.names import require_name
from vmferry.model.views import HostView, VmView

T = TypeVar("T")

ASK_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What one host said: a value or an error."""

    endpoint: Endpoint
    value: T | None = None
    error: VmferryError | None = None


def ask_all(
    endpoints: Sequence[Endpoint], question: Callable[[HostClient], T], limit_s: float = ASK_LIMIT_S
) -> list[Answer[T]]:
    """All hosts at once; the answers come in the order of `endpoints`, after `limit_s` at the latest (roughly)."""
    answers: list[Answer[T] | None] = [None] * len(endpoints)
    faults: list[Exception] = []

    def ask(number: int, endpoint: Endpoint) -> None:
        try:
            answers[number] = Answer(endpoint, question(HostClient(endpoint, limit_s)))
        except VmferryError as error:
            answers[number] = Answer(endpoint, error=error)
        except Exception as error:  # noqa: BLE001 - raised again in the asking thread
            faults.append(error)

    # daemon threads: a host that hangs must not keep the command from ending
    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in enumerate(endpoints)]
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if faults:
        raise faults[0]
    return [answer or _too_late(endpoint) for answer, endpoint in zip(answers, endpoints, strict=True)]


def _too_late(endpoint: Endpoint) -> Answer[T]:
    message = f"{endpoint.name} ({endpoint.where}) did not answer in time."
    return Answer(endpoint, error=Unreachable("no-answer", message, "Look at vmferryd's log there."))


def select(session: Session) -> tuple[Endpoint, ...]:
    """The endpoints that count: all, or the one that `--host` names. Raises NotFound `unknown-host`."""
    endpoints = find_endpoints(session.config)
    return endpoints if session.host is None else (_named(endpoints, session.host),)


def _named(endpoints: Sequence[Endpoint], name: str) -> Endpoint:
    for endpoint in endpoints:
        if endpoint.name == name:
            return endpoint
    if endpoints[0].name == LOCAL_NAME and HostClient(endpoints[0]).host().name == name:
        return endpoints[0]
    known = ", ".join(endpoint.name for endpoint in endpoints)
    raise NotFound(
        "unknown-host",
        f"No host “{name}” is configured; configured is {known}.",
        "Add it to the client's configuration (--config, VMFERRY_CONFIG or /etc/vmferry/client.toml).",
    )


def host_client(session: Session, name: str) -> HostClient:
    """The client of the host with this name. Raises NotFound `unknown-host`."""
    return HostClient(_named(find_endpoints(session.config), require_name(name, "host")))


def only_client(session: Session, name: str | None) -> HostClient:
    """The host with this name; without a name the only one that is configured. Raises WrongInput `which-host`."""
    if name is not None:
        return host_client(session, name)
    endpoints = find_endpoints(session.config)
    if len(endpoints) > 1:
        known = ", ".join(endpoint.name for endpoint in endpoints)
        raise WrongInput("which-host", f"Several hosts are configured: {known}.", "Name the one you mean.")
    return HostClient(endpoints[0])


def gather(session: Session, question: Callable[[HostClient], tuple[T, ...]]) -> list[T]:
    """What all hosts have. Those that do not answer are said on stderr.

    Raises the error if none answers, and also if the others have nothing: it may all be on the silent ones.
    """
    answers = ask_all(select(session), question)
    found = [item for answer in answers for item in answer.value or ()]
    silent = [answer for answer in answers if answer.error]
    if silent and not found:
        raise _worst(silent)
    _say_silent(answers)
    return found


def _worst(answers: Sequence[Answer[T]]) -> VmferryError:
    """The error when nobody answers: the first one, the others are said before it."""
    _say_silent(answers[1:])
    error = answers[0].error
    assert error is not None
    return error


def _say_silent(answers: Iterable[Answer[T]]) -> None:
    for answer in answers:
        if answer.error is not None and not isinstance(answer.error, NotFound):
            print_warning(answer.error.message)


def hosts(session: Session) -> list[HostView]:
    """The configured hosts as they see themselves, and the peers they know beside those."""
    endpoints = select(session)
    answers = ask_all(endpoints, lambda client: client.host())
    seen = [answer.value or _silent(answer) for answer in answers]
    speaking = next((answer.endpoint for answer in answers if answer.value), None)
    if speaking is None and session.config is None and endpoints[0].name == LOCAL_NAME:
        raise _worst(answers)
    if speaking is None or session.host is not None:
        return seen
    names = {view.name for view in seen}
    return seen + [view for view in HostClient(speaking).hosts() if view.name not in names]


def _silent(answer: Answer[HostView]) -> HostView:
    error = answer.error
    assert error is not None
    problem = f"{error.message} {error.fix}".strip()
    return HostView(answer.endpoint.name, answer.endpoint.where, reachable=False, problem=problem)


def owner(session: Session, name: str) -> tuple[HostClient, VmView]:
    """The host that owns a VM, and the VM as it shows it.

    Raises NotFound `no-such-vm` when every host was asked and none has it, Unreachable when one of those that did not
    answer may have it, Conflict `claimed-twice` when two say it is theirs.
    """
    require_name(name, "VM")
    answers = ask_all(select(session), lambda client: client.vm(name))
    found = [(answer.endpoint, answer.value) for answer in answers if answer.value]
    if not found:
        raise _none_has(answers, f"VM “{name}”", "no-such-vm", "vmferry vm list shows all of them.")
    _say_silent(answers)
    owners = newest([view for _, view in found])
    if len(owners) > 1:
        raise Conflict(
            "claimed-twice",
            f"VM “{name}” is claimed by {' and '.join(sorted(view.host for view in owners))}.",
            "Name the one you mean with --host; vmferry migration list shows a migration that is not settled.",
        )
    return next((HostClient(endpoint), view) for endpoint, view in found if view is owners[0])


def newest(views: Sequence[VmView]) -> list[VmView]:
    """The views without those that are outdated: a VM's newer generation is elsewhere (the end of a migration)."""
    generations: dict[str, int] = {}
    for view in views:
        generations[view.spec.id] = max(view.spec.generation, generations.get(view.spec.id, 0))
    kept: dict[tuple[str, str], VmView] = {}
    for view in views:  # by host too: one host may be configured under two names
        if view.spec.generation == generations[view.spec.id]:
            kept.setdefault((view.spec.id, view.host), view)
    return list(kept.values())


def _none_has(answers: Sequence[Answer[T]], what: str, code: str, fix: str) -> VmferryError:
    silent = [answer for answer in answers if not isinstance(answer.error, NotFound)]
    asked = ", ".join(answer.endpoint.name for answer in answers if answer not in silent)
    if not silent:
        return NotFound(code, f"There is no {what} on {asked}.", fix)
    if len(silent) == len(answers):
        return _worst(answers)
    _say_silent(answers)
    missing = ", ".join(answer.endpoint.name for answer in silent)
    message = f"There is no {what} on {asked}, and {missing} could not be asked."
    return Unreachable("owner-not-found", message, "Bring that host back, or correct the client's configuration.")


@dataclass(frozen=True, slots=True)
class Record:
    """A migration as one host records it."""

    client: HostClient
    view: MigrationView


def records(session: Session, migration_id: str) -> list[Record]:
    """All records of a migration, the one to be asked first: the source's.

    Raises NotFound `no-such-migration`, Unreachable.
    """
    answers = ask_all(select(session), lambda client: client.migration(migration_id))
    found = [Record(HostClient(answer.endpoint), answer.value) for answer in answers if answer.value]
    if not found:
        fix = "vmferry migration list shows all of them."
        raise _none_has(answers, f"migration “{migration_id}”", "no-such-migration", fix)
    _say_silent(answers)
    return sorted(found, key=lambda record: record.view.role is not Role.SOURCE)


def migrations(session: Session) -> list[MigrationView]:
    """Every migration once (the source's record if there is one), newest first."""
    by_id: dict[str, MigrationView] = {}
    for view in gather(session, lambda client: client.migrations()):
        if view.id not in by_id or view.role is Role.SOURCE:
            by_id[view.id] = view
    return sorted(by_id.values(), key=lambda view: view.started_at, reverse=True)


def unsettled(found: Sequence[Record]) -> list[Record]:
    """The records that say their outcome is unknown."""
    return [record for record in found if record.view.outcome is Outcome.UNKNOWN]
