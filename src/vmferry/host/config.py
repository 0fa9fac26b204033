"""vmferryd's settings: one TOML file in, one frozen `HostConfig` out.

All faults are reported at once, each with file, key, what was found and what is allowed. It reads that file and
nothing else: whether a device, directory or user exists is for those who use them to find out.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.host.settings import (
    MISSING,
    Key,
    Table,
    absolute_path,
    choice,
    device_name,
    duration,
    endpoint,
    flag,
    ip_address,
    line,
    name_of,
    names,
    rate,
    read_table,
    size,
    whole_number,
)
from vmferry.model.errors import NotFound, WrongInput

DEFAULT_PATH = Path("/etc/vmferry/vmferryd.toml")
DEFAULT_PORT = 7443


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """A place for images; `kind` is `directory`."""

    name: str
    kind: str
    path: Path


@dataclass(frozen=True, slots=True)
class SwitchConfig:
    """A virtual switch: the bridge `device`, and the interfaces through which it reaches the world."""

    name: str
    kind: str
    device: str
    uplinks: tuple[str, ...]
    mtu: int


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """How other hosts reach this one. `address` "" means that the daemon listens only on its Unix socket.

    `network_bandwidth_bps` is the ceiling for all migrations together, 0 for none. `tls` is about the memory and disk
    streams; the API between hosts is always TLS.
    """

    address: str
    port: int
    tls: bool
    network_bandwidth_bps: int
    gate_port: int
    tunnel: str


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """How many, and how long before a watchdog of the migration gives up. Each is explained in vmferryd.toml."""

    incoming: int
    outgoing: int
    memory_reserve_bytes: int
    connect_timeout_ms: int
    request_timeout_ms: int
    start_timeout_ms: int
    prepare_timeout_ms: int
    peer_silence_ms: int
    qemu_silence_ms: int
    disk_stall_ms: int
    memory_stall_ms: int
    switchover_stall_ms: int
    switchover_limit_ms: int
    handoff_retry_ms: int
    forward_limit_ms: int
    clock_difference_ms: int


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """Another host and where its API listens."""

    name: str
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Everything that vmferryd is told. `guest_user` "" runs guests as the daemon's own user."""

    name: str
    state_dir: Path
    run_dir: Path
    guest_user: str
    qemu: str
    accel: str
    socket_group: str
    tls_dir: Path
    pools: tuple[PoolConfig, ...]
    switches: tuple[SwitchConfig, ...]
    migration: MigrationConfig
    limits: LimitsConfig
    peers: tuple[PeerConfig, ...]

    @property
    def socket_path(self) -> Path:
        """The Unix socket on which the API answers local clients."""
        return self.run_dir / "vmferryd.sock"


_HOST: Table = {
    "name": Key(name_of("host"), MISSING),
    "state_dir": Key(absolute_path, "/var/lib/vmferry"),
    "run_dir": Key(absolute_path, "/run/vmferry"),
    "guest_user": Key(line, "vmferry"),
    "qemu": Key(line, "qemu-system-x86_64"),
    "accel": Key(choice("auto", "kvm", "tcg"), "auto"),
    "socket_group": Key(line, ""),
}
_POOL: Table = {
    "name": Key(name_of("pool"), MISSING),
    "kind": Key(choice("directory"), "directory"),
    "path": Key(absolute_path, MISSING),
}
_SWITCH: Table = {
    "name": Key(name_of("switch"), MISSING),
    "kind": Key(choice("bridge"), "bridge"),
    "device": Key(device_name, MISSING),
    "uplinks": Key(names(device_name), []),
    "mtu": Key(whole_number(68, 65521), 1500),
}
_MIGRATION: Table = {
    "address": Key(ip_address, ""),
    "port": Key(whole_number(1, 65535), DEFAULT_PORT),
    "tls": Key(flag, True),
    "network_bandwidth": Key(rate, "0", "_bps"),
    "gate_port": Key(whole_number(1, 65535), 4790),
    "tunnel": Key(choice("vxlan"), "vxlan"),
}
_LIMITS: Table = {
    "incoming": Key(whole_number(0, 1000), 2),
    "outgoing": Key(whole_number(0, 1000), 2),
    "memory_reserve": Key(size, "512MiB", "_bytes"),
    "connect_timeout": Key(duration, "5s", "_ms"),
    "request_timeout": Key(duration, "15s", "_ms"),
    "start_timeout": Key(duration, "30s", "_ms"),
    "prepare_timeout": Key(duration, "60s", "_ms"),
    "peer_silence": Key(duration, "4500ms", "_ms"),
    "qemu_silence": Key(duration, "1500ms", "_ms"),
    "disk_stall": Key(duration, "30s", "_ms"),
    "memory_stall": Key(duration, "30s", "_ms"),
    "switchover_stall": Key(duration, "10s", "_ms"),
    "switchover_limit": Key(duration, "1s", "_ms"),
    "handoff_retry": Key(duration, "500ms", "_ms"),
    "forward_limit": Key(duration, "10s", "_ms"),
    "clock_difference": Key(duration, "2s", "_ms"),
}
_TLS: Table = {"dir": Key(absolute_path, "")}
_TABLES: dict[str, Table] = {"host": _HOST, "migration": _MIGRATION, "limits": _LIMITS, "tls": _TLS}
_LISTS: dict[str, Table] = {"pool": _POOL, "switch": _SWITCH}
_PEERS = "peers"


def load_config(path: Path | str = DEFAULT_PATH) -> HostConfig:
    """The settings in the TOML file at `path`. Blocking; for the start of the daemon.

    Raises NotFound `no-config` when there is no such file, and WrongInput `bad-config`, whose message names every fault
    on a line of its own.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound("no-config", f"There is no configuration file {path}.", "Copy vmferryd.toml there.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, [f"cannot be read: {error}"]) from error
    return parse_config(text, path)


def parse_config(text: str, path: Path | str = DEFAULT_PATH) -> HostConfig:
    """The settings in `text`; `path` is only for the messages. Pure. Raises WrongInput `bad-config`."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _bad(path, [f"is not TOML: {error}"]) from error
    faults: list[str] = []
    values = {name: read_table(document.get(name, {}), table, f"[{name}]", faults) for name, table in _TABLES.items()}
    lists = {name: _read_list(document.get(name, []), table, name, faults) for name, table in _LISTS.items()}
    peers = _read_peers(document.get(_PEERS, {}), faults)
    known: Table = {name: Key(flag, None) for name in (*_TABLES, *_LISTS, _PEERS)}
    read_table({key: None for key in document if key not in known}, known, "top level", faults)
    _find_doubles(lists, faults)
    if faults:
        raise _bad(path, faults)
    return _build(values, lists, peers)


def _bad(path: Path | str, faults: list[str]) -> WrongInput:
    return WrongInput(
        "bad-config", "\n".join(f"{path}: {fault}" for fault in faults), "Correct the file and start vmferryd again."
    )


def _read_list(found: object, table: Table, name: str, faults: list[str]) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        faults.append(f"[[{name}]] must be written with two brackets, once for every {name}.")
        return []
    return [read_table(entry, table, f"[[{name}]] number {index}", faults) for index, entry in enumerate(found, 1)]


def _read_peers(found: object, faults: list[str]) -> tuple[PeerConfig, ...]:
    if not isinstance(found, dict):
        faults.append('[peers] must be a table of lines such as: host2 = "192.0.2.2:7443".')
        return ()
    rows: Table = {key: Key(endpoint(DEFAULT_PORT), MISSING) for key in found}
    read = read_table(found, rows, "[peers]", faults)
    check_name = name_of("host")
    peers = []
    for name, value in read.items():
        try:
            peers.append(PeerConfig(check_name(name), *value))
        except ValueError as error:
            faults.append(f"[peers] {name[:80]!r} is found; allowed is {error}.")
    return tuple(peers)


def _find_doubles(lists: dict[str, list[dict[str, Any]]], faults: list[str]) -> None:
    for name, key in (("pool", "name"), ("pool", "path"), ("switch", "name"), ("switch", "device")):
        seen: set[object] = set()
        for entry in lists[name]:
            value = entry.get(key)
            if value is not None and value in seen:
                faults.append(f"[[{name}]] {key} = '{value}' is there twice; each {name} needs one of its own.")
            seen.add(value)


def _build(
    values: dict[str, dict[str, Any]], lists: dict[str, list[dict[str, Any]]], peers: tuple[PeerConfig, ...]
) -> HostConfig:
    host = values["host"]
    return HostConfig(
        **host,
        tls_dir=values["tls"]["dir"] or host["state_dir"] / "tls",
        pools=tuple(PoolConfig(**entry) for entry in lists["pool"]),
        switches=tuple(SwitchConfig(**entry) for entry in lists["switch"]),
        migration=MigrationConfig(**values["migration"]),
        limits=LimitsConfig(**values["limits"]),
        peers=peers,
    )
