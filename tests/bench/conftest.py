"""A clock for benchmarks, so that no test depends on a real time."""

from types import SimpleNamespace

import pytest

from lightning_gpt.strategies import devices


@pytest.fixture
def takes(monkeypatch):
    """Stop the clock of timed runs; return a function that makes each call of a method advance it by some seconds."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def advance(cls, method, seconds):
        original = getattr(cls, method)

        def timed(*args, **kwargs):
            now.seconds += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, method, timed)

    return advance
