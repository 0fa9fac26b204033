"""Unit tests are the same in every run: hypothesis takes its examples from a fixed seed and keeps no database."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def _can_be_interrupted() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and every process below inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
