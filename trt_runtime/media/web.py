"""What is at an address of http or https, fetched within limits."""

from __future__ import annotations

import base64
import http.client
import ssl
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit


def fetch(
    url: str, *, timeout_s: float, most: int, agent: str, going_on: Callable[[], None] = lambda: None
) -> tuple[bytes, str]:
    """Return what is at an address, and where redirections led.

    User and password may stand in the address (Basic and Digest). Certificates are not checked, as FFmpeg does not.

    Args:
        url: Address.
        timeout_s: How long all of it may take.
        most: Bytes; when there are more, reading ends soon after them.
        agent: Who asks.
        going_on: Called while parts arrive; what it raises ends the transfer.

    Raises:
        OSError: There is no answer, or one of failure, or a malformed one.
        ValueError: The address is malformed.
    """
    address = urlsplit(url)
    login, _, host = address.netloc.rpartition("@")
    plain = quote(address._replace(netloc=host, fragment="").geturl(), safe="%/:=&?~+!$,;'@()*[]")
    request = urllib.request.Request(plain, headers={"User-Agent": agent})
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.OpenerDirector()  # of http and https alone
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=unchecked),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    if login:
        user, _, password = (unquote(part) for part in login.partition(":"))
        encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
        known = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        known.add_password(None, plain, user, password)
        handlers.append(urllib.request.HTTPDigestAuthHandler(known))
    for handler in handlers:
        opener.add_handler(handler)
    end = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            parts, size = [], 0
            while size <= most and (part := response.read1(65536)):
                going_on()
                if time.monotonic() > end:
                    raise TimeoutError(f"no answer within {timeout_s:g} s")
                parts.append(part)
                size += len(part)
            found = urlsplit(response.geturl())
    except http.client.HTTPException as error:
        raise OSError(f"malformed answer: {error!r}") from None
    if login and found.netloc == host:
        found = found._replace(netloc=address.netloc)
    return b"".join(parts), found.geturl()
