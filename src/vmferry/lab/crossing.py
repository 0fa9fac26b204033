"""One migration as it was seen from all sides: its receipt, the client's probes, the guest. And the judgement on it.

For demo and soak. `Watch` measures around a migration that somebody else starts; `judge_*` are pure and give plain
sentences, none if all is as it must be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

from vmferry.lab.guest_client import GuestClient, GuestStatus
from vmferry.lab.health import Health, judge_health, observe_health
from vmferry.lab.layout import LabLayout
from vmferry.lab.probes.launch import RunningProbe, start_probe
from vmferry.lab.trial_vm import STREAM_PORT, UDP_PORT, TrialVm, find_owner, host_client
from vmferry.model.errors import Failed
from vmferry.model.migration import MigrationView, Outcome, Phase, Role, Verify
from vmferry.model.receipt import Receipt
from vmferry.model.views import VmView
from vmferry.model.vm import RunState

PROBES_PER_S = 500
_PROMPT_MS = 400.0  # well within the time that the probe waits for its last replies
LATE_MS = 1000.0
_AROUND = timedelta(seconds=1)
_CATCH_UP_S, _CATCH_UP_EASED_S = 3.0, 40.0


@dataclass(frozen=True, slots=True)
class Stall:
    """The longest silence of the TCP stream during a migration; `exact` False: it was shorter than this."""

    ms: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Crossing:
    """A migration that completed. `udp` is the probe's report (lab.probes.udp) over a time around it."""

    receipt: Receipt
    signature_valid: bool
    owner: VmView
    udp: dict[str, Any]
    before: GuestStatus
    health: Health

    @property
    def guest_drops(self) -> int:
        """Requests dropped by the guest itself meanwhile, after they had arrived there."""
        return self.health.guest_drops - self.before.udp["buffer_drops"]

    @property
    def silent_at_end_ms(self) -> float:
        """How long before its last request the client had its last reply."""
        return float(self.udp["silent_at_end_ms"] or 0)

    @property
    def lost_requests(self) -> int:
        """Probes that never arrived in the guest (by its own count), and that it did not drop itself."""
        arrived = self.health.status.udp["received"] - self.before.udp["received"]
        return max(0, int(self.udp["sent"]) - arrived - self.guest_drops)

    @property
    def lost_replies(self) -> int:
        """Probes that the guest answered and whose answer the client never got."""
        return max(0, int(self.udp["lost"]) - self.lost_requests - self.guest_drops)

    @property
    def lost_on_the_way(self) -> int:
        """Both together: the network's losses."""
        return self.lost_requests + self.lost_replies

    @property
    def lost_at_the_switchover(self) -> list[dict[str, Any]]:
        """The losses that the move can have caused. A guest starved of CPU loses some at any time, with any tool."""
        times = {phase.name: phase for phase in self.receipt.phases}
        begin = datetime.fromisoformat(times[Phase.SWITCHOVER].started_at) - _AROUND
        end = datetime.fromisoformat(times[Phase.FINISH].ended_at) + _AROUND
        return [run for run in self.udp["lost_runs"] if begin <= datetime.fromisoformat(run["at"]) <= end]


class Watch:
    """Probes the VM from the lab's client for as long as one migration takes. Use it in `with`."""

    def __init__(self, layout: LabLayout, vm: TrialVm, guest: GuestClient) -> None:
        self._layout = layout
        self._vm = vm
        self._guest = guest
        self.before = guest.status(within_s=60.0)
        options = ("--target", vm.address, "--port", str(UDP_PORT), "--rate", str(PROBES_PER_S))
        self._probe = start_probe(layout.client_namespace, "udp", *options)

    def __enter__(self) -> Self:
        self._probe.wait_until_received()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._probe.__exit__(kind, error, trace)

    def finish(self, view: MigrationView) -> Crossing:
        """After the migration's end: everything measured. Raises Failed `not-completed` and what asking raises."""
        self._await_caught_up()
        udp = self._probe.stop()
        if view.outcome is not Outcome.COMPLETED:
            why = view.reason.message if view.reason else "no reason given"
            raise Failed("not-completed", f"The migration {view.id} is {view.outcome.value}: {why}", "See the logs.")
        source = host_client(self._layout.host(view.source))
        receipt, signature = source.receipt(view.id), source.check_receipt(view.id)
        health = observe_health(self._guest, self.before)
        owner = find_owner(self._layout, self._vm.name)
        return Crossing(receipt, signature[0], owner, udp, self.before, health)

    def _await_caught_up(self) -> None:
        """Until the guest answers promptly again: what it has not answered yet, for want of CPU, is not lost.

        On a machine that is busy otherwise the guest's load is taken away meanwhile.
        """
        if self._answers_promptly(_CATCH_UP_S):
            return
        before = self.before
        self._guest.set_load(0, 0, within_s=60.0)
        self._answers_promptly(_CATCH_UP_EASED_S)
        self._guest.set_load(before.memory.rate_bytes // 1_000_000, before.disk.rate, within_s=60.0)

    def _answers_promptly(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            now = self._probe.progress()
            if now.get("rtt_ms") is not None and max(now["rtt_ms"], now["silent_ms"]) < _PROMPT_MS:
                return True
            time.sleep(0.1)
        return False


def start_stream(layout: LabLayout, vm: TrialVm, bytes_per_s: int) -> RunningProbe:
    """A TCP stream from the guest to the client whose content the client checks. Use it in `with`."""
    options = ("--target", vm.address, "--port", str(STREAM_PORT), "--bytes-per-second", str(bytes_per_s))
    return start_probe(layout.client_namespace, "stream", *options)


def find_newest(layout: LabLayout, host_name: str, vm_name: str) -> MigrationView:
    """The newest migration of the VM away from the host. Raises Failed `no-migration`."""
    for view in host_client(layout.host(host_name)).migrations():  # newest first
        if view.vm == vm_name and view.role is Role.SOURCE:
            return view
    raise Failed("no-migration", f"{host_name} knows of no migration of {vm_name}.", "See its log.")


def judge_crossing(crossing: Crossing) -> tuple[str, ...]:
    """Everything that is not as it must be."""
    return (
        *judge_receipt(crossing.receipt, crossing.signature_valid),
        *_judge_place(crossing),
        *_judge_udp(crossing),
        *judge_health(crossing.before, crossing.health),
    )


def judge_receipt(receipt: Receipt, signature_valid: bool) -> tuple[str, ...]:
    """What the receipt itself admits."""
    wrong = []
    if receipt.outcome is not Outcome.COMPLETED:
        wrong.append(f"the migration ended otherwise than completed: {receipt.outcome.value}")
    if receipt.frames.lost:
        wrong.append(f"{receipt.frames.lost} of the VM's frames were lost at its ports")
    wrong += _judge_digests(receipt)
    if not (receipt.network.reachable_before and receipt.network.reachable_after):
        wrong.append("the receipt has no network proof: the VM's switches were not seen connected before and after")
    if (receipt.blackout_ms or 0) <= 0 or receipt.total_ms <= 0:
        wrong.append(f"the receipt's times make no sense: pause {receipt.blackout_ms}, total {receipt.total_ms} ms")
    if not signature_valid:
        wrong.append("the receipt's signature is not valid")
    return tuple(wrong)


def _judge_digests(receipt: Receipt) -> list[str]:
    verified, wanted = receipt.verified, receipt.options.verify
    wrong = [f"disk {disk.name} differs between the hosts" for disk in verified.disks if not disk.equal]
    if wanted is not Verify.NONE and not verified.disks:
        wrong.append("no disk was compared")
    if verified.memory is not None and not verified.memory.equal:
        wrong.append("the guest's memory differs between the hosts")
    if wanted is Verify.ALL and verified.memory is None:
        wrong.append("the guest's memory was not compared")
    return wrong


def _judge_place(crossing: Crossing) -> list[str]:
    receipt, owner = crossing.receipt, crossing.owner
    wrong = []
    if owner.host != receipt.target:
        wrong.append(f"{receipt.vm} is owned by {owner.host}, not by {receipt.target}")
    if owner.state is not RunState.RUNNING:
        wrong.append(f"{receipt.vm} is {owner.state.value} on {owner.host}, not running")
    if owner.spec.generation != receipt.generation:
        wrong.append(f"the VM's generation is {owner.spec.generation}, the receipt says {receipt.generation}")
    return wrong


def _judge_udp(crossing: Crossing) -> list[str]:
    udp = crossing.udp
    wrong = []
    if not udp["received"]:
        wrong.append("the client got no answer to any UDP probe")
    if crossing.silent_at_end_ms > LATE_MS:
        seconds = f"{crossing.silent_at_end_ms / 1000:.1f} s"
        wrong.append(
            f"the guest was {seconds} behind with its UDP replies long after the move: is this machine too busy?"
        )
    elif crossing.lost_on_the_way and crossing.lost_at_the_switchover:
        told = (
            f"{crossing.lost_requests} requests, {crossing.lost_replies} replies; {crossing.guest_drops} in the guest"
        )
        at = ", ".join(f"{run['count']} at {run['at']}" for run in crossing.lost_at_the_switchover[:3])
        wrong.append(f"{crossing.lost_on_the_way} UDP probes were lost on the way ({told}; {at})")
    if udp["duplicates"]:
        wrong.append(f"{udp['duplicates']} UDP probes were delivered twice")
    return wrong


def judge_stream(report: dict[str, Any]) -> tuple[str, ...]:
    """`report` is that of the TCP stream over all migrations."""
    wrong = []
    if report["broken"]:
        wrong.append(f"the TCP connection broke: {report['reason']}")
    if report["content_errors"]:
        wrong.append(f"{report['content_errors']} bytes of the TCP stream were wrong")
    if not report["bytes_received"]:
        wrong.append("nothing came over the TCP connection")
    return tuple(wrong)


def find_stall(report: dict[str, Any], receipt: Receipt) -> Stall | None:
    """The stream's longest silence while the migration ran; None if the report has no silences at all."""
    begun = datetime.fromisoformat(receipt.started_at).timestamp() * 1e9
    ended = begun + receipt.total_ms * 1e6
    stalls: list[dict[str, Any]] = report["stalls"]
    if not stalls:
        return None
    during = [stall["ms"] for stall in stalls if stall["end_ns"] >= begun and stall["begin_ns"] <= ended]
    return Stall(max(during), True) if during else Stall(stalls[-1]["ms"], False)
