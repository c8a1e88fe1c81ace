"""The server's web page, and which requests the server accepts.

A robot's client sends the token in a header, and a browser asks its user for it (HTTP Basic, any user name). Browsers
cannot add headers to a websocket, so the page contains a ticket, unique to the server process, that opens one. Other
web pages do not have it: a websocket with an Origin but no ticket is refused. A server without a token sends the page
only to browsers that use a loopback name; otherwise a foreign host name that resolves to 127.0.0.1 would get it.
"""

import base64
import hmac
import secrets
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from spatialvla_jax.serving.access import is_loopback

HTML = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page:
    """The page of one server, whose clients send `token` unless it is empty."""

    def __init__(self, token: str) -> None:
        self.token, self.ticket = token, secrets.token_urlsafe(16)

    def admits(self, request: Request) -> bool:
        """Whether the request opens a websocket from this page."""
        return "Upgrade" in request.headers and _same(request.path, f"/?ticket={self.ticket}")

    def refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response that refuses a request not covered by `admits`; None if the request is allowed."""
        if self.token and not self._has_token(", ".join(request.headers.get_all("Authorization"))):
            text = "the header 'Authorization: Api-Key TOKEN' is needed; in a browser, the token is the password\n"
            response = connection.respond(HTTPStatus.UNAUTHORIZED, text)
            response.headers["WWW-Authenticate"] = 'Basic realm="spatialvla-jax serve", charset="UTF-8"'
            return response
        if "Upgrade" in request.headers and "Origin" in request.headers:
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages other than this server's own are refused\n")
        host = ", ".join(request.headers.get_all("Host")).rpartition("@")[2]
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if request.path == "/" and "Upgrade" not in request.headers and not (self.token or is_loopback(name)):
            return connection.respond(HTTPStatus.FORBIDDEN, "without a token, the page is only at http://localhost\n")
        return None

    def respond(self, connection: ServerConnection) -> Response:
        """The page itself."""
        nonce = secrets.token_urlsafe(16)
        html = HTML.read_text("utf-8").replace("{{ nonce }}", nonce).replace("{{ ticket }}", self.ticket)
        response = connection.respond(HTTPStatus.OK, html)
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "text/html; charset=utf-8"
        response.headers["Content-Security-Policy"] = POLICY.format(nonce)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    def _has_token(self, given: str) -> bool:
        if given.startswith("Basic "):
            try:
                password = base64.b64decode(given[6:], validate=True).partition(b":")[2].decode()
            except ValueError:  # neither base64 nor UTF-8
                return False
            given = f"Api-Key {password}"
        return _same(given, f"Api-Key {self.token}")


def _same(one: str, two: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode(errors="surrogateescape"), two.encode())
