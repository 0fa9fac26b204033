"""The lab: hosts as network namespaces on this machine, each with the real vmferryd, a switch and a client.

For the CLI's `lab` verbs, the demo, the bench and the tests. interface.md ("The lab") says what it looks like.
`lab_up` and `lab_down` exclude each other by a lock that a killed process loses; `lab_down` needs no memory of what
`lab_up` did. Everything here blocks: call it through a thread from asyncio.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from vmferry.lab import daemons, processes
from vmferry.lab.layout import (
    CLIENT_ADDRESS,
    DEFAULT_PREFIX,
    LabLayout,
    existing_namespaces,
    require_layout,
)
from vmferry.lab.processes import Process
from vmferry.lab.wiring import build_network, run_tool
from vmferry.model.errors import Conflict, Failed, NotFound

_RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class LabState:
    """A lab that is up. `daemons` is by host name; empty if it was made without daemons."""

    layout: LabLayout
    daemons: dict[str, Process]

    def document(self) -> dict[str, Any]:
        """What `vmferry lab up --json` prints: names, addresses, directories and processes."""
        layout = self.layout
        return {
            "prefix": layout.prefix,
            "link_bps": layout.link_bps,
            "hosts": [
                {
                    "name": host.name,
                    "namespace": host.namespace,
                    "migration_address": host.migration_address,
                    "directory": str(host.directory),
                    "socket": str(host.socket),
                    "pools": {name: str(path) for name, path in host.pools.items()},
                    "daemon": _told(self.daemons.get(host.name)),
                }
                for host in layout.hosts
            ],
            "client": {"name": "client", "namespace": layout.client_namespace, "address": CLIENT_ADDRESS},
            "switch": {"name": "switch", "namespace": layout.switch_namespace},
            "client_config": str(layout.client_config),
        }


def _told(process: Process | None) -> dict[str, Any] | None:
    if process is None:
        return None
    return {**asdict(process), "running": processes.is_running(process)}


def lab_up(
    hosts: int = 3,
    link_bps: int = 10**9,
    prefix: str = DEFAULT_PREFIX,
    with_daemons: bool = True,
    accel: str = "auto",
) -> LabState:
    """Brings the lab up, or completes one of the same shape: daemons that died are started, guests are left alone.

    Left-overs of a lab that was not finished are removed first. Raises WrongInput, Conflict `lab-differs` if a
    lab of another shape is up, Failed if something does not work (nothing is left then).
    """
    layout = require_layout(prefix, hosts, link_bps, accel)
    _require_root()
    with _locked(layout) as lock:
        kept = _read_record(prefix)
        if kept is not None and _all_namespaces(kept.layout):
            if kept.layout != layout:
                raise Conflict("lab-differs", "A lab of another shape is up.", "Take it down first: vmferry lab down.")
            return _ensure_daemons(kept) if with_daemons else kept
        _remove_everything(prefix, lock)
        try:
            return _build(layout, with_daemons, lock)
        except BaseException:
            _remove_everything(prefix, lock, keep_logs=True)
            raise


def lab_down(prefix: str = DEFAULT_PREFIX) -> None:
    """Stops and removes all of the lab, whatever state it is in. Idempotent. Raises Failed `lab-process-stuck`."""
    layout = require_layout(prefix, 1, 10**9)
    _require_root()
    with _locked(layout) as lock:
        _remove_everything(prefix, lock)
        layout.lock.unlink()


def lab_status(prefix: str = DEFAULT_PREFIX) -> LabState:
    """The lab that is up. Raises NotFound `no-lab`."""
    state = _read_record(prefix)
    if state is None:
        raise NotFound("no-lab", "No lab is up.", "Start one: vmferry lab up.")
    return state


def lab_exec(prefix: str, name: str, argv: Sequence[str]) -> int:
    """Runs a command in the namespace of `host1`, ..., `client` or `switch`; gives its exit status.

    The CLI inside finds this lab. Raises NotFound `no-lab`, `no-namespace`.
    """
    layout = lab_status(prefix).layout
    namespace = f"{prefix}-{name}"
    if namespace not in layout.namespaces:
        known = ", ".join(known.removeprefix(f"{prefix}-") for known in layout.namespaces)
        raise NotFound("no-namespace", f"The lab has no {name!r}.", f"It has {known}.")
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"  # `vmferry` works in there
    environment = {**os.environ, "VMFERRY_CONFIG": str(layout.client_config), "PATH": path}
    return subprocess.run([*exec_prefix(namespace), *argv], env=environment, check=False).returncode


def exec_prefix(namespace: str) -> list[str]:
    """What to put before a command so that it runs in the namespace."""
    return ["ip", "netns", "exec", namespace]


def restart_daemon(prefix: str, host_name: str, signal_number: int) -> Process:
    """Ends a host's vmferryd with the signal, starts it again and waits until it answers. Guests are left alone."""
    stop_daemon(prefix, host_name, signal_number)
    return resume_daemon(prefix, host_name)


def stop_daemon(prefix: str, host_name: str, signal_number: int) -> None:
    """Signals a host's vmferryd and waits until it is gone. Raises Failed `lab-process-stuck` after 20 s."""
    process = lab_status(prefix).daemons.get(host_name)
    if process is None or not processes.send_signal(process, signal_number):
        return
    deadline = time.monotonic() + 20
    while processes.is_running(process):
        if time.monotonic() > deadline:
            raise Failed("lab-process-stuck", f"vmferryd of {host_name} does not end.", "Read its log.")
        time.sleep(0.005)
    processes.reap(process)


def resume_daemon(prefix: str, host_name: str) -> Process:
    """Starts a host's vmferryd if it is not running, and waits until it answers."""
    state = lab_status(prefix)
    host = state.layout.host(host_name)
    with _locked(state.layout):
        return _ensure_daemons(state, only=host.name).daemons[host.name]


def _build(layout: LabLayout, with_daemons: bool, lock: TextIO) -> LabState:
    layout.run_root.mkdir(parents=True, exist_ok=True)
    layout.state_root.mkdir(parents=True, exist_ok=True)
    with _kept_by_tools(lock):
        build_network(layout)
    for host in layout.hosts:
        daemons.write_host_config(host)
    daemons.write_identities(layout)
    state = LabState(layout, {})
    if with_daemons:
        state = _ensure_daemons(state)
    daemons.write_client_config(layout)
    _write_record(state)
    return state


def _ensure_daemons(state: LabState, only: str | None = None) -> LabState:
    running = dict(state.daemons)
    started = []
    for host in state.layout.hosts:
        known = running.get(host.name)
        if only not in (None, host.name) or (known and processes.is_running(known)):
            continue
        running[host.name] = daemons.start_daemon(host)
        started.append(host)
    state = replace(state, daemons=running)
    if state.layout.record.exists():
        _write_record(state)  # before waiting: whoever comes next must not start a second one
    for host in started:
        daemons.wait_until_answering(host, running[host.name])
    return state


def _require_root() -> None:
    if os.geteuid() != 0:
        raise Failed("not-root", "A lab needs root: it makes network namespaces.", "Run it with sudo.")


@contextlib.contextmanager
def _locked(layout: LabLayout) -> Iterator[TextIO]:
    layout.lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with layout.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock, layout.lock):
                continue  # a `lab down` has removed it while we waited: this lock locks nothing any more
            yield lock
            return


def _is_at(opened: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _kept_by_tools(lock: TextIO) -> Iterator[None]:
    """If we are killed, an `ip` that we started goes on: the lock is free only once that has ended too."""
    os.set_inheritable(lock.fileno(), True)
    try:
        yield
    finally:
        os.set_inheritable(lock.fileno(), False)


def _all_namespaces(layout: LabLayout) -> bool:
    return {path.name for path in existing_namespaces(layout.prefix)} >= set(layout.namespaces)


def _write_record(state: LabState) -> None:
    """Written last, in one step: a lab with a record was complete."""
    document = {
        "version": _RECORD_VERSION,
        "layout": asdict(state.layout),
        "daemons": {name: asdict(process) for name, process in state.daemons.items()},
        "lab": state.document(),
    }
    fresh = state.layout.record.with_suffix(".new")
    fresh.write_text(json.dumps(document, indent=1), encoding="utf-8")
    fresh.replace(state.layout.record)


def _read_record(prefix: str) -> LabState | None:
    path = LabLayout(prefix).record
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != _RECORD_VERSION:
            return None
        found = {name: Process(**process) for name, process in document["daemons"].items()}
        return LabState(LabLayout(**document["layout"]), found)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # no lab, or one that was not finished: lab_up and lab_down clear it away


def _remove_everything(prefix: str, lock: TextIO, keep_logs: bool = False) -> None:
    layout = LabLayout(prefix)
    layout.record.unlink(missing_ok=True)
    layout.client_config.unlink(missing_ok=True)
    # Again until none is found: what is being ended may have started something.
    while found := processes.find_lab_processes(prefix):
        processes.end_processes(found)
    with _kept_by_tools(lock):
        for namespace in existing_namespaces(prefix):
            _remove_namespace(namespace)
        _unmount_below(layout.state_root)
    if keep_logs:
        _keep_logs(layout)
    else:
        shutil.rmtree(layout.kept_logs, ignore_errors=True)
    if layout.state_root.exists():
        shutil.rmtree(layout.state_root)
    shutil.rmtree(layout.run_root, ignore_errors=True)


def _remove_namespace(path: Path) -> None:
    try:
        run_tool(["ip", "netns", "delete", path.name])
    except Failed:
        # Its file is there, but nothing is mounted on it: `ip netns add` was killed half-way.
        path.unlink(missing_ok=True)


def _unmount_below(root: Path) -> None:
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{root}/"):
            run_tool(["umount", "--lazy", mount])


def _keep_logs(layout: LabLayout) -> None:
    """After a failed start the daemons' logs say why; they outlive the lab until the next `lab down`."""
    shutil.rmtree(layout.kept_logs, ignore_errors=True)
    layout.kept_logs.mkdir(parents=True)
    for log in layout.state_root.glob("host*/vmferryd.log"):
        shutil.copyfile(log, layout.kept_logs / f"{log.parent.name}.log")
