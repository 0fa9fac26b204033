"""Where the hosts are: the client's configuration. For CLI and web pages; it reads one file and opens no connection.

```toml
[[host]]
name = "host1"
socket = "/run/vmferry/vmferryd.sock"       # either a Unix socket of this machine ...

[[host]]
name = "host2"
address = "192.0.2.2:7443"                  # ... or mutual TLS, with this client's certificate
tls_dir = "/etc/vmferry/tls"
```

The first of these counts: `--config`, `VMFERRY_CONFIG`, `/etc/vmferry/client.toml`, a running lab's file, and without
any of them the local daemon's socket.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.errors import NotFound, VmferryError, WrongInput
from vmferry.model.names import require_name

DEFAULT_SOCKET = Path("/run/vmferry/vmferryd.sock")
SYSTEM_CONFIG = Path("/etc/vmferry/client.toml")
LAB_CONFIG = Path("/run/vmferry-lab/client.toml")
LOCAL_NAME = "local"

_KEYS = ("name", "socket", "address", "tls_dir")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One host: either `socket`, or `address` ("host:port") with `tls_dir`. `LOCAL_NAME` names an unconfigured one."""

    name: str
    socket: Path | None = None
    address: str = ""
    tls_dir: Path | None = None

    @property
    def where(self) -> str:
        """For messages: the path or the address."""
        return str(self.socket) if self.socket else self.address


def find_endpoints(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> tuple[Endpoint, ...]:
    """The configured hosts, at least one. Raises WrongInput `no-config`, `bad-config` (with file and key)."""
    named = config or (Path(environ["VMFERRY_CONFIG"]) if environ.get("VMFERRY_CONFIG") else None)
    if named is not None:
        return read_endpoints(named)
    for path in (SYSTEM_CONFIG, LAB_CONFIG):
        if path.exists():
            return read_endpoints(path)
    return (Endpoint(LOCAL_NAME, socket=DEFAULT_SOCKET),)


def read_endpoints(path: Path) -> tuple[Endpoint, ...]:
    """The hosts of one configuration file, in its order. Errors as `find_endpoints`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(
            "no-config", f"There is no configuration {path}.", "Correct --config or VMFERRY_CONFIG."
        ) from error
    except OSError as error:
        raise WrongInput(
            "no-config", f"{path} cannot be read: {error.strerror}.", "Correct its permissions."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(path, f"not TOML: {error}", "Correct the line named.") from error
    for key in document:
        if key != "host":
            raise _wrong(path, f"unknown key “{key}”", "Only [[host]] tables belong here.")
    tables = document.get("host", [])
    if not isinstance(tables, list) or not tables:
        raise _wrong(path, "host: no host is named", 'Add [[host]] with name = "..." and socket = "...".')
    return _distinct(path, tuple(_endpoint(path, number, table) for number, table in enumerate(tables)))


def _endpoint(path: Path, number: int, table: object) -> Endpoint:
    where = f"host[{number}]"
    if not isinstance(table, dict):
        raise _wrong(path, f"{where}: not a table", "Write [[host]].")
    for key, value in table.items():
        if key not in _KEYS:
            raise _wrong(path, f"{where}.{key}: unknown key", f"Known are {', '.join(_KEYS)}.")
        if not isinstance(value, str) or not value:
            raise _wrong(path, f"{where}.{key}: must be a text that is not empty", f'Write {key} = "...".')
    name = table.get("name", "")
    try:
        require_name(name, "host")
    except WrongInput as error:
        raise _wrong(path, f"{where}.name: {error.message}", error.fix) from error
    if ("socket" in table) == ("address" in table):
        raise _wrong(path, f"{where}: needs either socket or address", 'socket = "/run/vmferry/vmferryd.sock"')
    if "socket" in table:
        if "tls_dir" in table:
            raise _wrong(path, f"{where}.tls_dir: a socket has no TLS", "Remove tls_dir, or give address for socket.")
        return Endpoint(name, socket=(path.parent / table["socket"]).absolute())
    if "tls_dir" not in table:
        raise _wrong(path, f"{where}.tls_dir: missing", "Name the directory with this client's certificate.")
    _require_address(path, f"{where}.address", table["address"])
    return Endpoint(name, address=table["address"], tls_dir=(path.parent / table["tls_dir"]).absolute())


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `10.0.0.1:7443`, `name:7443` or `[fd00::1]:7443`. Raises WrongInput `bad-address`."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare is host) or not port.isascii() or not port.isdigit():
        raise WrongInput(
            "bad-address", f"“{address}” is not HOST:PORT.", "Write it like 192.0.2.2:7443 or [fd00::1]:7443."
        )
    if not 1 <= int(port) <= 65_535:
        raise WrongInput("bad-address", f"“{address}” has no possible port.", "Ports are 1 to 65535.")
    return bare, int(port)


def _require_address(path: Path, where: str, address: str) -> None:
    try:
        split_address(address)
    except WrongInput as error:
        raise _wrong(path, f"{where}: {error.message}", error.fix) from error


def _distinct(path: Path, endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    seen: set[str] = set()
    for number, endpoint in enumerate(endpoints):
        if endpoint.name in seen:
            raise _wrong(path, f"host[{number}].name: “{endpoint.name}” is there twice", "Give every host one table.")
        seen.add(endpoint.name)
    return endpoints


def _wrong(path: Path, what: str, fix: str) -> VmferryError:
    return WrongInput("bad-config", f"{path}: {what}.", fix)
