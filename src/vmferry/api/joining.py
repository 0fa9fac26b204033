"""How a host gets its certificates: as the first one, which makes the CA, or with a one-time token of the CA's host.

For the CLI's `host init` and `host join`; blocks on files and on the network. The exchange, over HTTPS and without a
certificate of our own: `GET /v1/ca` gives `{"ca": PEM}` from anybody, which counts only if its fingerprint is the
token's; then, to a server of that CA only, `POST /v1/join` with `{"token_secret", "host_name", "address", "host_csr",
"stream_csr"}` gives `{"ca", "host_certificate", "stream_certificate", "peers": {name: address}}`. Keys stay here.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmferry.api import pki
from vmferry.api.endpoints import Endpoint, split_address
from vmferry.api.tokens import JoinToken, parse_token
from vmferry.api.transport import bad_answer, exchange
from vmferry.model.errors import Conflict, WrongInput
from vmferry.model.names import require_name

if TYPE_CHECKING:
    import ssl

_TIMEOUT_S = 30.0
_DEFAULT_PORT = 7443
_DEFAULT_STATE = "/var/lib/vmferry"
_DEFAULT_RUN = "/run/vmferry"
_DEFAULT_USER = "vmferry"


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A host that is to get certificates: its name, its "IP:PORT", where they go, and who reads the streams' keys.

    `stream_gid` is the group of the guests' user, None where guests run as root. `socket` is its daemon's.
    """

    name: str
    address: str
    tls_dir: Path
    socket: Path
    stream_gid: int | None = None


def read_newcomer(
    daemon_config: Path, name: str | None = None, address: str | None = None, tls_dir: Path | None = None
) -> Newcomer:
    """From the daemon's settings, where they exist, and from what is said instead of them.

    Raises WrongInput `bad-config`, `no-name`, `no-address`, `bad-name`, `bad-address`.
    """
    settings = _read_settings(daemon_config)
    host, migration = settings["host"], settings["migration"]
    found_name = name or host.get("name")
    if not found_name:
        raise WrongInput("no-name", f"{daemon_config} names no host ([host] name).", "Give --name.")
    if address is None:
        if not migration.get("address"):
            raise WrongInput("no-address", f"{daemon_config} has no [migration] address.", "Give --address IP:PORT.")
        address = _join_address(str(migration["address"]), migration.get("port", _DEFAULT_PORT))
    split_address(address)
    state = Path(str(host.get("state_dir", _DEFAULT_STATE)))
    return Newcomer(
        name=require_name(str(found_name), "host"),
        address=address,
        tls_dir=tls_dir or Path(str(settings["tls"].get("dir") or state / "tls")),
        socket=Path(str(host.get("run_dir", _DEFAULT_RUN))) / "vmferryd.sock",
        stream_gid=_group_of(str(host.get("guest_user", _DEFAULT_USER))),
    )


def _read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """The three tables that matter here. What else is wrong in the file is for the daemon to say."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        document = {}
    except OSError as error:
        raise WrongInput("bad-config", f"{path} cannot be read: {error.strerror}.", "Correct its rights.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WrongInput("bad-config", f"{path} is not TOML: {error}.", "Correct the line named.") from error
    tables = {name: document.get(name, {}) for name in ("host", "migration", "tls")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise WrongInput("bad-config", f"{path}: {name} is not a table.", f"Write [{name}].")
    return tables


def _join_address(ip: str, port: object) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _group_of(user: str) -> int | None:
    import pwd

    try:
        return pwd.getpwnam(user).pw_gid if user else None
    except KeyError:
        return None


def init(host: Newcomer) -> None:
    """Makes the CA and this host's certificates. Raises Conflict `ca-exists` if there is an identity already."""
    pki.create_ca(host.tls_dir, f"vmferry CA of {host.name}")
    pki.issue_host(host.tls_dir, host.name, [split_address(host.address)[0]], host.stream_gid)


def join(host: Newcomer, token_text: str) -> dict[str, str]:
    """Gets this host's certificates and gives the hosts known to the CA's host: names and addresses.

    Raises WrongInput `bad-token`, Conflict `own-ca`, Refused (`other-ca`, `token-unknown`, `token-expired`, ...),
    Unreachable, OutcomeUnknown when the answer was lost: the token may then be used up.
    """
    token = parse_token(token_text)
    if pki.has_ca(host.tls_dir):
        raise Conflict("own-ca", f"{host.tls_dir} holds a CA of its own.", "Remove that directory to join another CA.")
    server = Endpoint(token.address, address=_join_address(token.address, token.port))
    context = _trusted(server, token)
    requests = pki.make_csr(host.tls_dir, host.name)
    body = {
        "token_secret": token.secret,
        "host_name": host.name,
        "address": host.address,
        "host_csr": requests.host_csr,
        "stream_csr": requests.stream_csr,
    }
    answer = exchange(server, "POST", "/v1/join", body, _TIMEOUT_S, context)
    issued = pki.HostCertificates(
        _text(server, answer, "host_certificate"),
        _text(server, answer, "stream_certificate"),
        _text(server, answer, "ca"),
    )
    pki.pin_ca(issued.ca_pem, token.fingerprint)
    pki.install_certificates(host.tls_dir, issued, host.stream_gid)
    peers = answer.get("peers", {})
    return {str(name): str(address) for name, address in peers.items()} if isinstance(peers, dict) else {}


def _trusted(server: Endpoint, token: JoinToken) -> ssl.SSLContext:
    """A context that trusts the token's CA only."""
    answer = exchange(server, "GET", "/v1/ca", None, _TIMEOUT_S, pki.bootstrap_context())
    pem = _text(server, answer, "ca")
    pki.pin_ca(pem, token.fingerprint)
    return pki.joiner_context(pem)


def _text(server: Endpoint, answer: object, key: str) -> str:
    value = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(value, str):
        raise bad_answer(server, "GET", f"no {key}")
    return value
