"""The demo's longer words: what is compared at the end, and what to try in a lab that is kept. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmferry.lab.crossing import LATE_MS, Crossing, find_stall
from vmferry.lab.layout import HostLayout, LabLayout
from vmferry.model.receipt import Receipt
from vmferry.model.units import format_ms, format_size

INTRODUCTION = (
    "A running VM moves between three hosts: memory, disk and connections together, with nothing shared between",
    "them. The hosts are network namespaces on this machine, each with the real vmferryd. What a client of the VM",
    "notices is measured from outside, and the VM itself checks its memory and its disk after each move.",
)


def summary(crossings: Sequence[Crossing], stream: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what the receipts say, what the client saw, what the guest found."""
    receipts = [crossing.receipt for crossing in crossings]
    columns = ["", *(f"{receipt.source} -> {receipt.target}" for receipt in receipts)]
    rows = [
        ["pause", *(format_ms(receipt.blackout_ms or 0) for receipt in receipts)],
        ["total", *(format_ms(receipt.total_ms) for receipt in receipts)],
        ["sent: memory", *(format_size(receipt.bytes.memory) for receipt in receipts)],
        ["sent: disk", *(format_size(receipt.bytes.disks) for receipt in receipts)],
        ["frames at the VM's port", *(f"{r.frames.held} held, {r.frames.lost} lost" for r in receipts)],
        ["digests on both hosts", *(_digests(receipt) for receipt in receipts)],
        ["network proof", *(_proof(receipt) for receipt in receipts)],
        ["client: longest UDP gap", *(format_ms(c.udp["longest_gap_ms"] or 0) for c in crossings)],
        ["client: UDP probes", *(_probes(crossing) for crossing in crossings)],
        ["client: longest TCP stall", *(_stall(stream, receipt) for receipt in receipts)],
        ["guest: memory pages", *(_checked(crossing.health.memory) for crossing in crossings)],
        ["guest: disk records", *(_checked(crossing.health.disk) for crossing in crossings)],
        ["guest: boot id", *(_boot(crossing) for crossing in crossings)],
    ]
    return columns, rows


def _digests(receipt: Receipt) -> str:
    found = [(disk.name, disk.equal) for disk in receipt.verified.disks]
    if receipt.verified.memory is not None:
        found.append(("memory", receipt.verified.memory.equal))
    different = [name for name, equal in found if not equal]
    if different:
        return f"DIFFERENT: {', '.join(different)}"
    return f"equal: {', '.join(name for name, _ in found)}" if found else "none compared"


def _proof(receipt: Receipt) -> str:
    before, after = receipt.network.reachable_before, receipt.network.reachable_after
    if before and after:
        return "before and after"
    return f"before: {_yes(before)}, after: {_yes(after)}"


def _yes(seen: bool | None) -> str:
    return "not looked at" if seen is None else "yes" if seen else "NO"


def _probes(crossing: Crossing) -> str:
    drops = crossing.guest_drops
    there = f", {drops} in the guest's full buffer" if drops else ""
    late = ", late" if crossing.silent_at_end_ms > LATE_MS else ""
    return f"{crossing.udp['sent']} sent, {crossing.lost_on_the_way} lost{late}{there}"


def _stall(stream: dict[str, Any], receipt: Receipt) -> str:
    stall = find_stall(stream, receipt)
    if stall is None:
        return "not measured"
    return format_ms(stall.ms) if stall.exact else f"under {format_ms(stall.ms)}"


def _checked(result: Any) -> str:
    return "none" if result is None else f"{result.checked} checked, {result.errors} wrong"


def _boot(crossing: Crossing) -> str:
    same = crossing.health.status.boot_id == crossing.before.boot_id
    return "unchanged" if same else "CHANGED"


def stream_words(report: dict[str, Any]) -> str:
    """One sentence on the TCP connection."""
    state = f"broke ({report['reason']})" if report["broken"] else "never broke"
    received, wrong = format_size(report["bytes_received"]), report["content_errors"]
    return f"TCP: one connection over all of it, which {state}; {received} received, {wrong} wrong bytes."


def things_to_try(command: Path, layout: LabLayout, vm: str, host: HostLayout, daemon_pid: int) -> list[str]:
    """What to do with a lab that is kept; the VM is on `host`."""
    here, there = host.name, layout.hosts[0].name
    prefix = "" if layout == LabLayout(layout.prefix) and layout.prefix == LabLayout().prefix else layout.prefix
    lab = f" --prefix {prefix}" if prefix else ""
    tries = [
        (f"{command} vm check {vm} --to {there}", "every obstacle at once; nothing moves"),
        (f"{command} vm migrate {vm} --to {there} --storage fast --verify all", "to another pool; hash memory too"),
        (f"{command} vm migrate {vm} --to {here} --max-blackout 30ms --bandwidth 500mbit", "with limits"),
        (
            f"{command} vm migrate {vm} --to {there} --bandwidth 100mbit --detach",
            "slow, in the background; prints an id",
        ),
        (f"{command} migration watch ID", "the live view again; Ctrl-C leaves it"),
        (f"{command} migration cancel ID", "the guest goes on where it is"),
        (f"{command} vm console {vm}", "its heartbeat; Ctrl-] leaves it"),
        (f"kill -9 {daemon_pid}; {command} lab up{lab}", f"{here}'s vmferryd dies and comes back; the guest goes on"),
        (f"{command} lab exec switch{lab} -- ip link set mig-{there} down", "cuts a link; up mends it"),
        (f"{command} lab down{lab}", "ends all of it"),
    ]
    lines = [f"export VMFERRY_CONFIG={layout.client_config}"] if prefix else []
    width = max(len(what) for what, _ in tries)
    return lines + [f"{what:{width}}  # {why}" for what, why in tries]
