"""vmferry as a contender: through its command line, as a user calls it, with its defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.plan import CPU_MODEL, DISK_GIB, MAC, MEMORY_MIB, GuestPlan
from vmferry.lab.layout import LabLayout
from vmferry.model.errors import Failed

_SPEC = """
name = "{name}"
cpus = 1
memory = "{memory}MiB"
cpu_model = "{cpu}"
[boot]
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "{cmdline}"
[[disk]]
name = "root"
pool = "local"
size = "{disk}GiB"
format = "qcow2"
image = "{image}"
[[nic]]
switch = "lan"
mac = "{mac}"
"""


class Ours:
    """`options` are added to `vmferry vm migrate`; without any it is the product as it comes."""

    def __init__(self, layout: LabLayout, home: Path, options: tuple[str, ...] = ()) -> None:
        self._source, self._target = (host.name for host in layout.hosts[:2])
        self._options = options
        self._spec = home / "vm.toml"
        self._environment = {**os.environ, "VMFERRY_CONFIG": str(layout.client_config)}
        self._count = 0
        self._name = ""

    def start(self, plan: GuestPlan) -> None:
        self._count += 1
        self._name = f"bench-{self._count}"
        self._spec.write_text(
            _SPEC.format(
                name=self._name,
                memory=MEMORY_MIB,
                cpu=CPU_MODEL,
                kernel=plan.kernel,
                initrd=plan.initrd,
                cmdline=plan.load.cmdline,
                disk=DISK_GIB,
                image=plan.template,
                mac=MAC,
            )
        )
        self._run("vm", "create", "-f", str(self._spec), "--host", self._source)
        self._run("vm", "start", self._name)

    def migrate(self) -> dict[str, Any]:
        self._run("vm", "migrate", self._name, "--to", self._target, *self._options)
        return {}

    def details(self) -> dict[str, Any]:
        """The receipt."""
        views = json.loads(self._run("migration", "list"))
        mine = next(view["id"] for view in views if view["vm"] == self._name)
        receipt: dict[str, Any] = json.loads(self._run("migration", "receipt", mine))
        return receipt

    def clear(self) -> None:
        views = json.loads(self._run("vm", "list"))
        for view in views:
            if view["spec"]["name"] == self._name:
                if view["state"] != "stopped":
                    self._run("vm", "kill", self._name)
                self._run("vm", "delete", self._name, "--yes")

    def _run(self, *words: str) -> str:
        program = Path(sys.executable).with_name("vmferry")
        done = subprocess.run(
            [str(program), *words, "--json"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self._environment,
        )
        if done.returncode != 0:
            told = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise Failed("bench-vmferry", f"vmferry {' '.join(words[:2])} failed ({done.returncode}): {told}", "")
        return done.stdout
