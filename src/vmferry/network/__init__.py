"""The host's switches and ports, the gate, announcements, tunnels, probes.

| module | what |
| --- | --- |
| `switches`, `ports` | bridges; a VM's port (a tap made by us, QEMU gets its descriptor) |
| `gate` | the gate of one migration and NIC: `SourceGate`, `TargetGate`, `remove_leftovers` |
| `announce`, `probes` | telling the network where a MAC lives; looking before a migration |
| `netlink`, `messages`, `redirects`, `tap`, `frames`, `tunnel`, `broadcasts` | the parts; not for other rooms |

All of it works in the network namespace of the process. Needs CAP_NET_ADMIN and CAP_NET_RAW.
"""
