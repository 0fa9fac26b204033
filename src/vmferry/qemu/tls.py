"""TLS objects inside a QEMU: credentials and who may connect. The files are QEMU's own layout (tls.rst).

One directory with ca-cert.pem, server-cert.pem and server-key.pem, client-cert.pem and client-key.pem, and better also
dh-params.pem (without it QEMU spends up to 0.7 s on making some). QEMU's user must be able to read them. QEMU before
10.1 demands key usage keyEncipherment (beside digitalSignature) of every certificate, also of an elliptic-curve one,
and keyCertSign of the CA; extended key usage is checked if it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmferry.qemu.monitor import Monitor


async def add_tls(monitor: Monitor, object_id: str, directory: Path, endpoint: str) -> None:
    """Loads credentials ("server" or "client"); the peer's certificate is always required. Raises QmpRefused.

    A certificate that has expired, or does not fit its key or CA, is refused here already.
    """
    await monitor.execute(
        "object-add", qom_type="tls-creds-x509", id=object_id, dir=str(directory), endpoint=endpoint, verify_peer=True
    )


async def add_authorization(monitor: Monitor, object_id: str, names: Sequence[str]) -> None:
    """Lets only peers in whose certificate has one of these distinguished names, as GnuTLS writes them (`CN=host1`).

    Raises QmpRefused.
    """
    rules = [{"match": name, "format": "exact", "policy": "allow"} for name in names]
    await monitor.execute("object-add", qom_type="authz-list", id=object_id, policy="deny", rules=rules)


async def remove_object(monitor: Monitor, object_id: str) -> None:
    """Removes an object. Raises QmpRefused if it is in use or not there."""
    await monitor.execute("object-del", id=object_id)
