"""A finished migration for people: the short receipt after it, and the whole one.

For the nouns `vm` and `migration`. Shows what the receipt says; judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from vmferry.cli.check_view import format_range
from vmferry.cli.display import facts, line, mark, table, text
from vmferry.model.receipt import Receipt
from vmferry.model.units import format_ms, format_size

_DIGEST_WIDTH = 32

Facts = Iterator[tuple[str, object]]


def show_short_receipt(receipt: Receipt) -> None:
    """What a user wants to know at the end: pause, total, bytes, frames, digests, network."""
    head = f"{receipt.vm} {receipt.outcome.value}: {receipt.source} {mark('→', '->')} {receipt.target}"
    line(head, "bold")
    facts(_short(receipt))


def show_receipt(receipt: Receipt, signature: tuple[bool, str]) -> None:
    """All of it, with the word on its signature (valid, reason)."""
    show_short_receipt(receipt)
    facts(_more(receipt, signature))
    rows = [(phase.name.value, phase.started_at, phase.ended_at or "-") for phase in receipt.phases]
    table(("PHASE", "FROM", "TO"), rows, "no phases")
    if receipt.switchover:
        steps = [(step.name, f"{step.at_ms:.2f} ms") for step in receipt.switchover]
        table(("STEP OF THE SWITCHOVER", ">AFTER STOP"), steps, "")


def _short(receipt: Receipt) -> Facts:
    predicted = receipt.predicted
    expected = f"  (predicted {format_range(predicted.blackout_ms)})" if predicted else ""
    pause = "not measured" if receipt.blackout_ms is None else format_ms(receipt.blackout_ms)
    yield "pause", text(pause, "bold") + text(expected, "dim")
    expected = f"  (predicted {format_range(predicted.total_ms)})" if predicted else ""
    yield "total", text(format_ms(receipt.total_ms)) + text(expected, "dim")
    memory, disks = format_size(receipt.bytes.memory), format_size(receipt.bytes.disks)
    reused = receipt.bytes.layers_reused
    sent = f"memory {memory} in {receipt.rounds} {'round' if receipt.rounds == 1 else 'rounds'}, disks {disks}"
    yield "sent", sent + (f", {format_size(reused)} were there already" if reused else "")
    frames = receipt.frames
    lost = text(f"{frames.lost} lost", "green" if frames.lost == 0 else "bold red")
    yield "frames", text(f"{frames.held} waited for the guest, {frames.forwarded} sent on by the source, ") + lost
    yield from _digests(receipt)
    yield "network", _network(receipt)


def _digests(receipt: Receipt) -> Facts:
    verified = receipt.verified
    if verified.memory is None and not verified.disks:
        yield "digests", "not compared (--verify none)"
    if verified.memory is not None:
        yield "memory", _equal(verified.memory.equal, verified.memory.source)
    for disk in verified.disks:
        yield f"disk {disk.name}", _equal(disk.equal, disk.source)


def _equal(equal: bool, digest: str) -> Text:
    word = text(f"{mark('✔', '+')} equal", "green") if equal else text(f"{mark('✘', 'x')} DIFFERENT", "bold red")
    shown = digest if len(digest) <= _DIGEST_WIDTH else digest[:_DIGEST_WIDTH] + mark("…", "...")
    return word + text(f"  {shown}", "dim")  # the whole digests are in the JSON


def _network(receipt: Receipt) -> Text:
    proof = receipt.network
    return (
        text("reachable before: ")
        + _proven(proof.reachable_before)
        + text(", after: ")
        + _proven(proof.reachable_after)
    )


def _proven(reachable: bool | None) -> Text:
    if reachable is None:
        return text("not tried", "dim")
    return text("yes", "green") if reachable else text("NO", "bold red")


def _more(receipt: Receipt, signature: tuple[bool, str]) -> Facts:
    valid, reason = signature
    yield "signature", text("valid", "green") if valid else text(f"NOT VALID: {reason}", "bold red")
    yield "id", receipt.id
    yield "started", receipt.started_at
    yield "generation", receipt.generation
    yield "versions", ", ".join(f"{name} {version}" for name, version in sorted(receipt.versions.items()))
