"""A web server on this machine."""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator

import pytest

Answer = tuple[int, dict[str, str], bytes]


class Site:
    """A web server on this machine; `answer` gives status, headers and content for a path; `paths` are those asked."""

    def __init__(self) -> None:
        self.answer: Callable[[str], Answer | None] = lambda path: None
        self.login = ""
        self.challenge = 'Basic realm="x"'
        self.paths: list[str] = []
        self.released = threading.Event()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.paths.append(self.path)
                if site.login and not site.knows(self.headers.get("Authorization") or "", self.path):
                    status, headers, content = 401, {"WWW-Authenticate": site.challenge}, b""
                else:
                    answer = site.answer(self.path)
                    if answer is None:  # silence
                        site.released.wait(60)
                        return
                    status, headers, content = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # the client has gone

        self.server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def knows(self, said: str, path: str) -> bool:
        """Whether a request brings the login, as the challenge asks for it (RFC 7617, RFC 7616 without qop)."""
        if self.challenge.startswith("Basic"):
            return said == f"Basic {base64.b64encode(self.login.encode()).decode()}"
        parts = dict(re.findall(r'(\w+)="([^"]*)"', said))
        user, _, password = self.login.partition(":")
        first, second = (hashlib.md5(text.encode()).hexdigest() for text in (f"{user}:x:{password}", f"GET:{path}"))
        return parts.get("response") == hashlib.md5(f"{first}:n:{second}".encode()).hexdigest()


@pytest.fixture(name="site")
def site_fixture() -> Iterator[Site]:
    made = Site()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.released.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()
