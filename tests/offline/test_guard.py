"""The network guard of .ci/run: it refuses connections to other machines and allows loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def _connect(host: str, port: int) -> subprocess.CompletedProcess:
    code = f"import socket; socket.create_connection(({host!r}, {port}), timeout=9)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_loopback_is_allowed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert _connect("127.0.0.1", server.getsockname()[1]).returncode == 0


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])  # addresses that are reserved for documentation
def test_other_machines_are_refused(host):
    done = _connect(host, 9)
    assert done.returncode and f"{host}: the network is cut off for the tests" in done.stderr
