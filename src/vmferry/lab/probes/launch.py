"""Starts a probe in a namespace and reads what it found. For the demo, the bench and tests."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vmferry.model.errors import Failed

_END_S = 15.0


def _fast_directory() -> str | None:
    """Memory, if there is: a disk's journal would hold the probe up for milliseconds."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class RunningProbe:
    """A probe's process. Use it in `with`: it is ended in any case."""

    def __init__(self, namespace: str, kind: str, *options: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vmferry-probe-", dir=_fast_directory())
        self._progress = Path(self._directory.name) / "progress.json"
        argv = ["ip", "netns", "exec", namespace, sys.executable, "-m", "vmferry.lab.probes", kind]
        argv += [*options, "--progress", str(self._progress)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._result: dict[str, Any] | None = None

    def __enter__(self) -> RunningProbe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._directory.cleanup()

    def progress(self) -> dict[str, Any]:
        """The latest state; empty before the first one."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            document: dict[str, Any] = json.loads(self._progress.read_text(encoding="utf-8"))
            return document
        return {}

    def wait_until_started(self, within_s: float = 15.0) -> None:
        """Returns once the probe is at work or has ended. Raises Failed `probe-failed`."""
        deadline = time.monotonic() + within_s
        while not self._progress.exists() and self._process.poll() is None:
            if time.monotonic() > deadline:
                raise Failed("probe-failed", "The probe does not start.", "Is the machine overloaded?")
            time.sleep(0.01)

    def wait_until_received(self, within_s: float = 10.0) -> None:
        """Returns once something came back. Raises Failed `probe-silent`."""
        deadline = time.monotonic() + within_s
        while not self.progress().get("received"):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise Failed("probe-silent", "The probe got no answer.", "Does the guest answer at this address?")
            time.sleep(0.02)

    def stop_by_itself(self, within_s: float = 60.0) -> dict[str, Any]:
        """Waits for a probe with a --duration to end. Raises Failed `probe-failed`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)  # its report fits the pipe
        return self.stop()

    def stop(self) -> dict[str, Any]:
        """Ends the probe and gives its report. Raises Failed `probe-failed`. Can be called again."""
        if self._result is not None:
            return self._result
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            output, complaints = self._process.communicate(timeout=_END_S)
            self._result = json.loads(output)
        except (subprocess.TimeoutExpired, ValueError) as error:
            self._process.kill()
            words = self._process.communicate()[1].decode(errors="replace").strip() or "no report"
            raise Failed("probe-failed", f"The probe failed: {words.splitlines()[-1]}.", "Report it.") from error
        if complaints and "error" in self._result:
            raise Failed("probe-failed", f"The probe failed: {self._result['error']}.", "Is the lab up?")
        return self._result


def start_probe(namespace: str, kind: str, *options: str) -> RunningProbe:
    """`start_probe("vmferry-client", "udp", "--target", "10.77.0.50", "--rate", "1000")`.

    Returns when the probe is at work (or has failed: `stop` tells).
    """
    probe = RunningProbe(namespace, kind, *options)
    probe.wait_until_started()
    return probe
