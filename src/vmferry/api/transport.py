"""One HTTP request to a host, over a Unix socket or mutual TLS. The client's door to `http.client` and `ssl`.

Only `vmferry.api` may use it. It knows no request of the API; it says of every failure what is known of the outcome:
`Unreachable` where the request was certainly not carried out, `OutcomeUnknown` where a change may have happened.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vmferry.api.codec import error_from_problem
from vmferry.api.endpoints import Endpoint, split_address
from vmferry.model.errors import Failed, OutcomeUnknown, Unreachable, VmferryError

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 5.0
_LARGEST_ANSWER = 64 << 20


def exchange(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: object,
    timeout_s: float,
    context: ssl.SSLContext | None = None,
) -> Any:
    """The parsed JSON of the answer. `timeout_s` limits every wait for bytes; `context` replaces `tls_dir`'s.

    Raises the error that the host's problem document tells of; Unreachable; OutcomeUnknown `answer-lost` when a request
    that changes something got no answer; Failed `bad-answer`.
    """
    with open_answer(endpoint, method, path, body, timeout_s, context) as answer:
        data = answer.read(_LARGEST_ANSWER)
    try:
        return json.loads(data)
    except ValueError as error:
        raise bad_answer(endpoint, method, "not JSON") from error


@contextmanager
def open_answer(
    endpoint: Endpoint,
    method: str,
    path: str,
    body: object,
    timeout_s: float,
    context: ssl.SSLContext | None = None,
) -> Iterator[http.client.HTTPResponse]:
    """The answer while it comes in, its status already judged. Errors as `exchange`, also while it is being read."""
    with _connect(endpoint, min(timeout_s, CONNECT_TIMEOUT_S), context) as connection:
        try:
            connection.settimeout(timeout_s)
            _send(connection, _request(method, path, body))
            with http.client.HTTPResponse(connection, method=method) as answer:
                answer.begin()
                if not 200 <= answer.status < 300:
                    raise _error_of(endpoint, answer)
                yield answer
        except (OSError, http.client.HTTPException) as error:
            raise _lost(endpoint, method, error) from error


def _send(connection: socket.socket, request: bytes) -> None:
    """Sends the request. A server that refuses our certificate may have closed before (with TLS 1.3 it judges it after
    our handshake is done); its alert, which says why, is then still there to be read.
    """
    try:
        connection.sendall(request)
    except TimeoutError:
        raise
    except OSError:
        connection.recv(1)  # raises the alert, if there is one
        raise


def _request(method: str, path: str, body: object) -> bytes:
    """In one piece, so that it goes out in one write."""
    lines = [f"{method} {path} HTTP/1.1", "Host: vmferry", "Accept: application/json", "Connection: close"]
    data = b"" if body is None else json.dumps(body).encode()
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + data


def _connect(endpoint: Endpoint, timeout_s: float, context: ssl.SSLContext | None) -> socket.socket:
    trusted = None if endpoint.socket else context or _tls_context(endpoint)
    try:
        if trusted is None:
            return _connect_unix(str(endpoint.socket), timeout_s)
        plain = socket.create_connection(split_address(endpoint.address), timeout_s)
        # judged by the host's name: an address is any host's that holds it
        return trusted.wrap_socket(plain, server_hostname=endpoint.name)
    except OSError as error:
        raise _unreachable(endpoint, error) from error


def _connect_unix(path: str, timeout_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def _tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    """A context that shows this client's certificate and trusts the hosts' CA only. Raises WrongInput from pki."""
    from vmferry.api import pki

    assert endpoint.tls_dir is not None  # read_endpoints demands it beside `address`
    return pki.client_context(endpoint.tls_dir)


def _unreachable(endpoint: Endpoint, error: OSError) -> VmferryError:
    who = f"{endpoint.name} ({endpoint.where})"
    distrust = _distrust(endpoint, error)
    if distrust is not None:
        return distrust
    if endpoint.socket and isinstance(error, PermissionError):
        fix = "Run this as root, or join the group that owns the socket (ls -l shows it)."
        return Unreachable("no-access", f"You may not speak to the daemon of {who}.", fix)
    if endpoint.socket and isinstance(error, FileNotFoundError | ConnectionRefusedError):
        fix = "Is vmferryd running? systemctl start vmferryd"
        return Unreachable("daemon-not-running", f"No daemon answers for {who}.", fix)
    reason = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
    fix = "Is vmferryd running there, and is the address in the client's configuration right?"
    return Unreachable("host-unreachable", f"{who} cannot be reached: {reason}.", fix)


def _distrust(endpoint: Endpoint, error: Exception) -> VmferryError | None:
    """Why TLS came to nothing, if that is what the error tells; with TLS 1.3 the server may say so late."""
    if endpoint.socket:
        return None
    import ssl

    from vmferry.api import pki

    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return None  # a connection that broke: nobody said anything about trust

    return pki.tls_problem(error, f"{endpoint.name} ({endpoint.where})")


def _lost(endpoint: Endpoint, method: str, error: Exception) -> VmferryError:
    distrust = _distrust(endpoint, error)
    if distrust is not None:
        return distrust
    reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    message = f"{endpoint.name} ({endpoint.where}) did not finish its answer: {reason}."
    if method == "GET":
        return Unreachable("answer-lost", message, "Try again; the daemon's log says more.")
    return OutcomeUnknown("answer-lost", message, "The request may have been carried out: look before you repeat it.")


def bad_answer(endpoint: Endpoint, method: str, reason: str) -> VmferryError:
    """An answer that came but cannot be understood; a change was then made and is not known in detail."""
    message = f"{endpoint.name} ({endpoint.where}) gave an answer that is not understood: {reason}."
    fix = "Use the same version of vmferry here and there."
    return (Failed if method == "GET" else OutcomeUnknown)("bad-answer", message, fix)


def _error_of(endpoint: Endpoint, answer: http.client.HTTPResponse) -> VmferryError:
    try:
        document = json.loads(answer.read(_LARGEST_ANSWER))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        who = f"{endpoint.name} ({endpoint.where})"
        message = f"{who} answered {answer.status} {answer.reason} without a problem document."
        return Failed("bad-answer", message, "Does vmferryd, and not another program, answer there?")
    return error_from_problem(document)
