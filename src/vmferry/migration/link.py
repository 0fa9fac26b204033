"""What the engine needs of the connection to the other host (`vmferry.host.peering` has it); a stand-in for none."""

from __future__ import annotations

from typing import Protocol, TypeVar

from vmferry.migration.messages import Request
from vmferry.model.errors import Failed, OutcomeUnknown, VmferryError

R = TypeVar("R")


class PeerLink(Protocol):
    """One connection to one host, open for the length of a migration.

    Guarantees: requests are carried out in the order sent; several may be in flight.
    """

    @property
    def peer(self) -> str:
        """The other host's name, as its certificate has it."""
        ...

    @property
    def local_address(self) -> str:
        """Our address on the network that this link uses."""
        ...

    @property
    def peer_address(self) -> str:
        """The other host's address on that network."""
        ...

    @property
    def rtt_ms(self) -> float:
        """The shortest round trip seen."""
        ...

    async def measure_rate(self) -> int:
        """Bytes a second that the link carries now, the best of some samples. Raises as `call` does."""
        ...

    async def call(self, request: Request, reply: type[R], timeout_s: float = 30.0, data: bytes = b"") -> R:
        """The answer. `data` goes with the request as it is (at most 32 MiB).

        Raises what the other side raised; `Unreachable` if it was never sent; `OutcomeUnknown` if the link was lost or
        the time ran out after it was sent.
        """
        ...

    async def wait_lost(self) -> VmferryError:
        """Returns, with the reason, once the link is lost."""
        ...

    async def close(self) -> None:
        """Ends the connection; requests in flight end with OutcomeUnknown."""
        ...


class LostLink:
    """Stands for the link of an earlier life of the daemon: everything on it is unreachable."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.local_address = self.peer_address = ""
        self.rtt_ms = 0.0

    async def call(self, request: Request, reply: type[R], timeout_s: float = 30.0, data: bytes = b"") -> R:
        """See PeerLink.call."""
        raise OutcomeUnknown("link-lost", f"The connection to {self.peer} was lost with the daemon.", "")

    async def measure_rate(self) -> int:
        """See PeerLink.measure_rate."""
        return 0

    async def wait_lost(self) -> VmferryError:
        """See PeerLink.wait_lost."""
        return Failed("link-lost", "The connection was lost with the daemon.", "")

    async def close(self) -> None:
        """See PeerLink.close."""
        return
