"""Names of VMs, hosts, disks, pools, switches: one rule, so that a name is safe as a file, a host name, a label."""

from __future__ import annotations

import re

from vmferry.model.errors import WrongInput

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_NO_MAC = "00:00:00:00:00:00"  # Linux refuses it too (is_valid_ether_addr)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")


def require_name(name: str, what: str) -> str:
    """Gives the name back. Raises WrongInput `bad-name` unless it is a DNS label (RFC 1123, lower case)."""
    if not _NAME.match(name):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise WrongInput(
            "bad-name",
            f"{shown!r} cannot be the name of a {what}.",
            "Use 1 to 63 lower-case letters, digits and hyphens; begin and end with a letter or digit.",
        )
    return name


def require_mac(mac: str) -> str:
    """The MAC in lower case. Raises WrongInput `bad-mac` unless it is a unicast Ethernet address."""
    lowered = mac.lower()
    if not _MAC.match(lowered) or int(lowered[:2], 16) & 1 or lowered == _NO_MAC:
        raise WrongInput("bad-mac", f"{mac[:40]!r} is not a unicast MAC address.", "Write it like 52:54:00:12:34:56.")
    return lowered


def stream_name(host: str) -> str:
    """The name of a host's guest processes in their certificate; what QEMU's `tls-hostname` must say.

    No host can have such a name: a host's name has no dots.
    """
    return f"stream.{host}"


def stream_identity(host: str) -> str:
    """The distinguished name of a host's guest processes as QEMU's authz objects compare it.

    QEMU 10.0 takes it from gnutls_x509_crt_get_dn, which keeps the certificate's order (not RFC 4514's reverse one);
    `vmferry.api.certificates` encodes it in this order. Checked in tests/contract/api/test_stream_tls.py.
    """
    return f"CN={stream_name(host)},O=vmferry"
