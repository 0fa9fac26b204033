"""Unit tests are the same in every run: hypothesis takes its examples from a fixed seed and keeps no database."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("fixed")
