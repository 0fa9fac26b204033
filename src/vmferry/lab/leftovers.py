"""What a migration left behind on a lab's hosts: processes, devices, traffic rules, images, directories, journal rows.

For soak and system tests, after a migration has ended in whatever way. Only looks, never removes. What is allowed to
be there follows from what each daemon says it owns. Everything blocks.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.host.journal import Journal
from vmferry.lab.layout import NETNS_ROOT, HostLayout, LabLayout
from vmferry.lab.trial_vm import host_client
from vmferry.migration.records import RecordState
from vmferry.model.errors import VmferryError
from vmferry.model.views import VmView
from vmferry.network.ports import PORT_PREFIX, port_name
from vmferry.storage.pool_files import IDENTITY_FILE

_OWN_LINKS = frozenset({"lo", "br-lan", "lan0", "mig0"})


@dataclass(frozen=True, slots=True, order=True)
class Leftover:
    """Something on a host that belongs to no VM there."""

    host: str
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.host}: {self.kind} {self.what}"


def wait_until_clean(
    layout: LabLayout, within_s: float = 15.0, ignore: Callable[[Leftover], bool] = lambda _: False
) -> tuple[Leftover, ...]:
    """Looks until nothing is left (hosts tidy up for a moment after the end); what is still there after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        found = tuple(item for item in find_leftovers(layout) if not ignore(item))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def find_leftovers(layout: LabLayout) -> tuple[Leftover, ...]:
    """All of them now, sorted. A host whose daemon does not answer is itself one (kind `daemon`)."""
    return tuple(sorted(item for host in layout.hosts for item in find_host_leftovers(host)))


def find_host_leftovers(host: HostLayout) -> Iterator[Leftover]:
    """One host's, in no order."""
    try:
        views = host_client(host).vms()
    except VmferryError as error:
        yield Leftover(host.name, "daemon", f"does not answer: {error.message}")
        return
    for kind, names in (
        ("process", _find_processes(host, views)),
        ("device", _find_devices(host, views)),
        ("traffic rule", _find_rules(host)),
        ("bridge entry", _find_bridge_entries(host, views)),
        ("image", _find_images(host, views)),
        ("directory", _find_directories(host, views)),
        ("journal row", _find_rows(host)),
    ):
        yield from (Leftover(host.name, kind, name) for name in names)


def _find_processes(host: HostLayout, views: Iterable[VmView]) -> Iterator[str]:
    """Everything in the namespace but the daemon and the guests of its VMs."""
    namespace = (NETNS_ROOT / host.namespace).stat().st_ino
    allowed = {view.pid for view in views}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in allowed:
            continue
        try:
            if (entry / "ns/net").stat().st_ino != namespace:
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if "vmferry.host.main" not in words and words != [""]:
            yield f"{entry.name} ({' '.join(words)[:100].strip()})"


def _find_devices(host: HostLayout, views: Iterable[VmView]) -> Iterator[str]:
    allowed = _port_names(views)
    for link in _ask("ip", "-n", host.namespace, "-json", "link", "show"):
        name = link["ifname"]
        if name not in _OWN_LINKS and name not in allowed:
            yield name


def _port_names(views: Iterable[VmView]) -> set[str]:
    """The ports of guests that run or wait here."""
    return {port_name(view.spec.id, index) for view in views if view.pid for index in range(len(view.spec.nics))}


def _find_rules(host: HostLayout) -> Iterator[str]:
    """Filters anywhere, and hooks on devices that are no ports."""
    for discipline in _ask("tc", "-n", host.namespace, "-json", "qdisc", "show"):
        if discipline["kind"] not in ("clsact", "ingress"):
            continue
        device = discipline["dev"]
        if not device.startswith(PORT_PREFIX):
            yield f"{discipline['kind']} on {device}"
        for hook in ("ingress", "egress"):
            for rule in _ask("tc", "-n", host.namespace, "-json", "filter", "show", "dev", device, hook):
                yield f"{rule.get('kind', 'filter')} at {hook} of {device}"


def _find_bridge_entries(host: HostLayout, views: Iterable[VmView]) -> Iterator[str]:
    """Sticky entries (they would keep frames away from where a VM goes next), and ports that are not flooded."""
    ports = _port_names(views)
    for entry in _ask("bridge", "-n", host.namespace, "-json", "fdb", "show"):
        if "sticky" in entry.get("flags", ()):
            yield f"{entry['mac']} sticky on {entry['ifname']}"
    for link in _ask("bridge", "-n", host.namespace, "-json", "-details", "link", "show"):
        deaf = [kind for kind in ("flood", "mcast_flood", "bcast_flood") if link.get(kind) is False]
        if link["ifname"] in ports and deaf:
            yield f"{link['ifname']} gets no broadcasts ({', '.join(deaf)} off)"


def _ask(*argv: str) -> list[dict[str, Any]]:
    """What a tool says in JSON; nothing if the device it was asked about has just gone."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        return []
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [entry for entry in found if entry]


def _find_images(host: HostLayout, views: Iterable[VmView]) -> Iterator[str]:
    allowed = {disk.path for view in views for disk in view.spec.disks}
    allowed |= {disk.backing for view in views for disk in view.spec.disks if disk.backing}
    for pool in host.pools.values():
        for path in _files_below(pool):
            if path.name != IDENTITY_FILE and str(path) not in allowed:
                yield str(path.relative_to(host.directory))


def _files_below(directory: Path) -> Iterator[Path]:
    """Files, and directories that are empty."""
    try:
        entries = sorted(directory.iterdir())
    except FileNotFoundError:  # removed while we look
        return
    for entry in entries:
        if not entry.is_dir():
            yield entry
            continue
        within = list(_files_below(entry))
        yield from within or [entry]


def _find_directories(host: HostLayout, views: Iterable[VmView]) -> Iterator[str]:
    """Of guests, twins and VMs that are not here."""
    running = {view.spec.id for view in views if view.pid}
    known = {view.spec.id for view in views}
    for parent, allowed in (
        (host.run_dir / "guests", running),
        (host.run_dir / "twins", set[str]()),
        (host.state_dir / "vms", known),
    ):
        if parent.is_dir():
            yield from (str(e.relative_to(host.directory)) for e in sorted(parent.iterdir()) if e.name not in allowed)


def _find_rows(host: HostLayout) -> Iterator[str]:
    """Migrations in the journal that have not ended."""
    path = host.state_dir / "journal.sqlite"
    if not path.exists():
        return
    for record in asyncio.run(_read_migrations(path)):
        if record[2] is not RecordState.ENDED:
            yield f"{record[0]} as {record[1]}: {record[2]}"


async def _read_migrations(path: Path) -> list[tuple[str, str, RecordState]]:
    journal = Journal(path)
    await journal.open()
    try:
        return [(record.id, record.role, record.state) for record in await journal.list_migrations()]
    finally:
        await journal.close()
