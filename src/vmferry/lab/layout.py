"""Names, addresses and directories of a lab. Pure: everything follows from the prefix and the number of hosts.

For all of `vmferry.lab` and for tests. Because nothing here has to be remembered, a lab can be taken down whatever
state it is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import WrongInput
from vmferry.model.names import require_name

DEFAULT_PREFIX = "vmferry"
MOST_HOSTS = 8  # 10.77.0.9 is the client
RUN_ROOT = Path("/run/vmferry-lab")
STATE_ROOT = Path("/var/lib/vmferry-lab")
NETNS_ROOT = Path("/run/netns")
LAN_BRIDGE = "br-lan"
MIGRATION_BRIDGE = "br-mig"
CLIENT_ADDRESS = "10.77.0.9"
MIGRATION_PORT = 7443


@dataclass(frozen=True, slots=True)
class HostLayout:
    """One host of a lab: number N of host N counts from 1."""

    lab: LabLayout
    number: int

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def namespace(self) -> str:
        return f"{self.lab.prefix}-{self.name}"

    @property
    def migration_address(self) -> str:
        return f"10.78.0.{self.number}"

    @property
    def directory(self) -> Path:
        return self.lab.state_root / self.name

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def socket(self) -> Path:
        return self.run_dir / "vmferryd.sock"

    @property
    def config(self) -> Path:
        return self.directory / "vmferryd.toml"

    @property
    def log(self) -> Path:
        return self.directory / "vmferryd.log"

    @property
    def pools(self) -> dict[str, Path]:
        return {name: self.directory / "pools" / name for name in ("local", "fast")}

    @property
    def lan_port(self) -> str:
        """The switch's end of the uplink."""
        return f"lan-{self.name}"

    @property
    def migration_port(self) -> str:
        """The switch's end of the migration link."""
        return f"mig-{self.name}"


@dataclass(frozen=True, slots=True)
class LabLayout:
    """A lab: `prefix` names its namespaces and directories, so that several can live side by side."""

    prefix: str = DEFAULT_PREFIX
    host_count: int = 3
    link_bps: int = 10**9
    accel: str = "auto"

    @property
    def hosts(self) -> tuple[HostLayout, ...]:
        return tuple(HostLayout(self, number) for number in range(1, self.host_count + 1))

    def host(self, name: str) -> HostLayout:
        for host in self.hosts:
            if host.name == name:
                return host
        raise WrongInput("unknown-host", f"The lab has no {name!r}.", f"It has host1 to host{self.host_count}.")

    @property
    def client_namespace(self) -> str:
        return f"{self.prefix}-client"

    @property
    def switch_namespace(self) -> str:
        return f"{self.prefix}-switch"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.switch_namespace, self.client_namespace, *(host.namespace for host in self.hosts))

    @property
    def state_root(self) -> Path:
        return STATE_ROOT / self.prefix

    @property
    def run_root(self) -> Path:
        return RUN_ROOT / self.prefix

    @property
    def record(self) -> Path:
        return self.run_root / "lab.json"

    @property
    def lock(self) -> Path:
        return RUN_ROOT / f"{self.prefix}.lock"

    @property
    def kept_logs(self) -> Path:
        """The daemons' logs of a `lab up` that failed."""
        return RUN_ROOT / f"{self.prefix}-logs"

    @property
    def client_config(self) -> Path:
        """Where the CLI's configuration is. The default lab's is the file that the CLI finds by itself."""
        return (RUN_ROOT if self.prefix == DEFAULT_PREFIX else self.run_root) / "client.toml"


def require_layout(prefix: str, hosts: int, link_bps: int, accel: str = "auto") -> LabLayout:
    """Raises WrongInput for a prefix that is no name, or a number or rate that the lab cannot have."""
    require_name(prefix, "lab")
    if len(prefix) > 40:
        raise WrongInput("bad-name", f"{prefix!r} is too long for a lab.", "Use at most 40 characters.")
    if not 1 <= hosts <= MOST_HOSTS:
        raise WrongInput("bad-hosts", f"A lab cannot have {hosts} hosts.", f"It can have 1 to {MOST_HOSTS}.")
    if link_bps < 10**5:
        raise WrongInput("bad-rate", f"A link of {link_bps} bit/s is too slow.", "Use 1mbit or more.")
    return LabLayout(prefix, hosts, link_bps, accel)


def existing_namespaces(prefix: str) -> Iterator[Path]:
    """The namespace files that belong to the lab: `PREFIX-switch`, `-client`, `-hostN` and no others."""
    if not NETNS_ROOT.is_dir():
        return
    for entry in sorted(NETNS_ROOT.iterdir()):
        role = entry.name.removeprefix(f"{prefix}-")
        if role == entry.name:
            continue
        if role in ("switch", "client") or (role.startswith("host") and role[4:].isdigit()):
            yield entry
