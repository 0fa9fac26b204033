"""Names of VMs, hosts, disks, pools, switches: one rule, so that a name is safe as a file, a host name, a label."""

from __future__ import annotations

import re

from vmferry.model.errors import WrongInput

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
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
    if not _MAC.match(lowered) or int(lowered[:2], 16) & 1:
        raise WrongInput("bad-mac", f"{mac[:40]!r} is not a unicast MAC address.", "Write it like 52:54:00:12:34:56.")
    return lowered
