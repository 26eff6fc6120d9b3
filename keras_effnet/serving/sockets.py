"""Sockets that listen: a port that is taken is told before a model is prepared."""

import errno
import ipaddress
import socket


def bound(host: str, port: int) -> socket.socket:
    """Binds a socket.

    Args:
        host: String. A name or an address of this machine.
        port: Integer. 0 for any that is free.

    Returns:
        `socket.socket`, which does not listen yet.

    Raises:
        OSError: If the address is none of this machine's, or the port is taken or not allowed.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = places[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            told = f"Expected a port that this user may use, such as 8080. Received: {port}. For any free one: --port 0"
            raise OSError(told) from error
        if error.errno == errno.EADDRINUSE:
            told = f"Expected a free port. Received: {port}, which is in use. For any free one: --port 0"
            raise OSError(told) from error
        raise OSError(
            f"Expected an address of this machine. Received: {host!r}, port {port}: {error.strerror}"
        ) from error
    return found


def address(listening: socket.socket) -> str:
    """Returns the URL of a bound socket, for a browser on this machine.

    Args:
        listening: A bound socket.

    Returns:
        String.
    """
    host, port = listening.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else str(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listening: socket.socket) -> bool:
    """Returns whether only this machine reaches a bound socket.

    Args:
        listening: A bound socket.

    Returns:
        Boolean.
    """
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
