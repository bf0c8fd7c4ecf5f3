"""Refuse connections beyond this machine, in every Python process that has this folder on its PYTHONPATH.

.ci/run uses it where it cannot cut off the network.
"""

import socket


class OfflineSocket(socket.socket):
    """A socket that connects to loopback addresses only."""

    def connect(self, address: object) -> None:
        """Connect, or raise OSError if the address is on another machine."""
        _require_loopback(self, address)
        super().connect(address)

    def connect_ex(self, address: object) -> int:
        """Connect and return the error number, or raise OSError if the address is on another machine."""
        _require_loopback(self, address)
        return super().connect_ex(address)


def _require_loopback(sock: socket.socket, address: object) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if host not in ("localhost", "::1", "") and not host.startswith("127."):
            raise OSError(f"{host}: the network is cut off for the tests")


socket.socket = OfflineSocket
