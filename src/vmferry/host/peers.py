"""The other hosts that this one knows: names, addresses, and links to them."""

from __future__ import annotations

from collections.abc import Callable
from ssl import SSLContext

from vmferry.host.config import HostConfig
from vmferry.host.journal import Journal
from vmferry.host.peering import WebSocketLink, connect_peer
from vmferry.model.errors import NotFound, Refused, WrongInput


class Peers:
    """Configured peers and those that joined or were added. A configured address wins."""

    def __init__(self, config: HostConfig, journal: Journal, context: Callable[[], SSLContext]) -> None:
        self._own_name = config.name
        self._configured = {peer.name: _join(peer.address, peer.port) for peer in config.peers}
        self._timeout_s = config.limits.connect_timeout_ms / 1000
        self._silence_s = config.limits.peer_silence_ms / 1000
        self._journal = journal
        self._context = context
        self._added: dict[str, str] = {}

    async def load(self) -> None:
        """Reads those that were added from the journal."""
        self._added = await self._journal.list_peers()

    def addresses(self) -> dict[str, str]:
        """Name to `address:port` of every other host that is known."""
        known = {**self._added, **self._configured}
        known.pop(self._own_name, None)
        return known

    def address_of(self, name: str) -> str:
        """Raises Refused `same-host` and NotFound `unknown-host`."""
        if name == self._own_name:
            raise Refused("same-host", f"The VM is on {name} already.", "Choose another host.")
        address = self.addresses().get(name)
        if address is None:
            known = ", ".join(sorted(self.addresses())) or "none"
            raise NotFound(
                "unknown-host",
                f"{self._own_name} knows no host named {name}.",
                f"Known: {known}. See `vmferry host add`.",
            )
        return address

    async def put(self, name: str, address: str) -> None:
        """Adds or changes a host. Raises WrongInput `bad-address`."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise WrongInput("bad-address", f"{address[:80]!r} is not an address.", "Write it like 192.0.2.7:7443.")
        await self._journal.put_peer(name, address)
        self._added[name] = address

    async def remove(self, name: str) -> None:
        """Forgets a host. Raises NotFound `unknown-host`, WrongInput `configured-host`."""
        if name in self._configured:
            raise WrongInput("configured-host", f"{name} is in the daemon's configuration.", "Remove it from [peers].")
        self.address_of(name)
        await self._journal.remove_peer(name)
        self._added.pop(name, None)

    async def connect(self, name: str) -> WebSocketLink:
        """A link to that host. Raises as `address_of` and `connect_peer` do."""
        return await connect_peer(name, self.address_of(name), self._context(), self._timeout_s, self._silence_s)


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
