"""The host's API (docs/api.md) as methods: synchronous, one connection a request, safe to use from threads.

For CLI and web pages. It decides nothing. Every method raises the VmferryError that the host's problem document tells
of, Unreachable when the host was not reached, OutcomeUnknown when the answer to a change was lost, and Failed (or
OutcomeUnknown) `bad-answer` when the answer is not understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from vmferry.api.codec import decode, encode
from vmferry.api.endpoints import Endpoint
from vmferry.api.transport import bad_answer, exchange, open_answer
from vmferry.model.errors import VmferryError, WrongInput
from vmferry.model.migration import CheckResult, MigrateOptions, MigrationView
from vmferry.model.receipt import Receipt
from vmferry.model.views import HostView, VmView

T = TypeVar("T")

READ_TIMEOUT_S = 30.0
ACT_TIMEOUT_S = 180.0  # starting a guest, proving KVM, the rehearsal of a check: seconds each, minutes on a slow host
IMPORT_TIMEOUT_S = 3600.0  # creating a VM copies its images
QUIET_EVENTS_S = 60.0  # a migration that says nothing for so long is asked anew


class HostClient:
    """A host to speak to. `read_timeout_s` limits requests that change nothing (name completion wants it short)."""

    def __init__(self, endpoint: Endpoint, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self.endpoint = endpoint
        self._read_timeout_s = read_timeout_s

    def host(self) -> HostView:
        """This host."""
        return self._get(HostView, "/v1/host")

    def hosts(self) -> tuple[HostView, ...]:
        """This host and its peers; peers that do not answer say why."""
        return self._get(tuple[HostView, ...], "/v1/hosts")

    def probe_host(self) -> HostView:
        """This host with its acceleration proven anew, by running a guest."""
        return self._post(HostView, "/v1/host/probe")

    def vms(self) -> tuple[VmView, ...]:
        """The VMs that this host owns."""
        return self._get(tuple[VmView, ...], "/v1/vms")

    def vm(self, name: str) -> VmView:
        """One VM. Raises NotFound."""
        return self._get(VmView, _vm(name))

    def create_vm(self, spec: Mapping[str, Any]) -> VmView:
        """Defines a VM and makes or imports its images; `spec` is the TOML of interface.md as it was parsed."""
        return self._post(VmView, "/v1/vms", {"spec": dict(spec)}, IMPORT_TIMEOUT_S)

    def delete_vm(self, name: str) -> None:
        """Deletes a stopped VM and its images. Raises Conflict while it runs."""
        self._exchange("DELETE", _vm(name), None, ACT_TIMEOUT_S)

    def start_vm(self, name: str) -> VmView:
        """Starts the guest of a stopped VM."""
        return self._post(VmView, f"{_vm(name)}/start")

    def stop_vm(self, name: str, timeout_ms: int = 60_000) -> VmView:
        """Asks the guest to shut down. Raises Failed if it did not within the time; it is not killed then."""
        return self._post(VmView, f"{_vm(name)}/stop", {"timeout_ms": timeout_ms}, timeout_ms / 1000 + 30)

    def kill_vm(self, name: str) -> VmView:
        """Ends the guest at once, as pulling the plug does."""
        return self._post(VmView, f"{_vm(name)}/kill")

    def pause_vm(self, name: str) -> VmView:
        """Halts the guest's vCPUs."""
        return self._post(VmView, f"{_vm(name)}/pause")

    def resume_vm(self, name: str) -> VmView:
        """Lets a paused guest run on."""
        return self._post(VmView, f"{_vm(name)}/resume")

    def check(self, name: str, to: str, options: MigrateOptions) -> CheckResult:
        """All findings and the prediction; nothing changes."""
        return self._post(CheckResult, f"{_vm(name)}/check", {"to": to, "options": encode(options)})

    def migrate(self, name: str, to: str, options: MigrateOptions) -> MigrationView:
        """Begins a migration, which goes on without this client."""
        return self._post(MigrationView, f"{_vm(name)}/migrate", {"to": to, "options": encode(options)})

    def migrations(self) -> tuple[MigrationView, ...]:
        """This host's migrations of both roles, newest first."""
        return self._get(tuple[MigrationView, ...], "/v1/migrations")

    def migration(self, migration_id: str) -> MigrationView:
        """One migration. Raises NotFound."""
        return self._get(MigrationView, _migration(migration_id))

    def migration_check(self, migration_id: str) -> CheckResult:
        """What the migration's own check found."""
        return self._get(CheckResult, f"{_migration(migration_id)}/check")

    def events(self, migration_id: str) -> Iterator[MigrationView]:
        """The migration at every change, until its outcome is known.

        Raises Unreachable when the host goes away or is quiet for a minute; the migration itself is not touched.
        """
        path = f"{_migration(migration_id)}/events"
        with open_answer(self.endpoint, "GET", path, None, QUIET_EVENTS_S) as answer:
            for line in answer:
                if line.strip():
                    yield self._decode(MigrationView, self._json(line), "GET")

    def cancel(self, migration_id: str) -> MigrationView:
        """Ends a migration; answers once the guest is known to run on the source. Raises Conflict after the handoff."""
        return self._post(MigrationView, f"{_migration(migration_id)}/cancel")

    def recover(self, migration_id: str, host_is_dead: str | None = None) -> MigrationView:
        """Settles a migration whose outcome is unknown. Naming a host as dead is the user's own word for it."""
        return self._post(MigrationView, f"{_migration(migration_id)}/recover", {"host_is_dead": host_is_dead})

    def receipt(self, migration_id: str) -> Receipt:
        """The signed record of a finished migration."""
        return self._get(Receipt, f"{_migration(migration_id)}/receipt")

    def check_receipt(self, migration_id: str) -> tuple[bool, str]:
        """Whether the receipt's signature is valid, and why not."""
        answer = self._exchange("POST", f"{_migration(migration_id)}/receipt/check", {}, self._read_timeout_s)
        if not isinstance(answer, dict):
            raise bad_answer(self.endpoint, "GET", "no object")
        return answer.get("valid") is True, str(answer.get("reason") or "")

    def create_token(self) -> tuple[str, str]:
        """A one-time token to join, and when it expires (RFC 3339). Raises Conflict on a host without the CA."""
        answer = self._exchange("POST", "/v1/tokens", {}, self._read_timeout_s)
        if not isinstance(answer, dict) or not isinstance(answer.get("token"), str):
            raise bad_answer(self.endpoint, "POST", "no token")
        return answer["token"], str(answer.get("expires_at", ""))

    def peers(self) -> dict[str, str]:
        """Names and addresses of the hosts known there."""
        return self._get(dict[str, str], "/v1/peers")

    def put_peer(self, name: str, address: str) -> None:
        """Makes a host known there, or corrects its address."""
        self._exchange("PUT", f"/v1/peers/{quote(name, safe='')}", {"address": address}, self._read_timeout_s)

    def delete_peer(self, name: str) -> None:
        """Makes a host unknown there."""
        self._exchange("DELETE", f"/v1/peers/{quote(name, safe='')}", None, self._read_timeout_s)

    def _get(self, kind: type[T], path: str) -> T:
        return self._decode(kind, self._exchange("GET", path, None, self._read_timeout_s), "GET")

    def _post(self, kind: type[T], path: str, body: object | None = None, timeout_s: float = ACT_TIMEOUT_S) -> T:
        return self._decode(kind, self._exchange("POST", path, {} if body is None else body, timeout_s), "POST")

    def _exchange(self, method: str, path: str, body: object, timeout_s: float) -> Any:
        return exchange(self.endpoint, method, path, body, timeout_s)

    def _decode(self, kind: type[T], data: object, method: str) -> T:
        try:
            return decode(kind, data)
        except WrongInput as error:  # what is wrong is the answer, not what the user asked for
            raise bad_answer(self.endpoint, method, error.message) from error

    def _json(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise self._not_json() from error

    def _not_json(self) -> VmferryError:
        return bad_answer(self.endpoint, "GET", "a line that is not JSON")


def _vm(name: str) -> str:
    return f"/v1/vms/{quote(name, safe='')}"


def _migration(migration_id: str) -> str:
    return f"/v1/migrations/{quote(migration_id, safe='')}"
