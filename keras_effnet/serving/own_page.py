"""Whether a request is for this server: other pages that are open in the browser may send requests too."""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers


def is_own(headers: Headers, names: Collection[str] | None) -> bool:
    """Returns whether a request is no other page's.

    Another page may name this server in its requests, which then have an `Origin` of their own; or give its own name
    this machine's address (DNS rebinding), which then is the `Host`. Browsers send both; other clients need not.

    Args:
        headers: The request's.
        names: Names in small letters, each a valid `Host`, as are all addresses that are numbers. None: any `Host`.

    Returns:
        Boolean.
    """
    host, origin = headers.get("host"), headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return False
    if host is None or names is None:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
