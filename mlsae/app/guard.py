"""Who is served: this machine's user, and nobody's web page.

A page of another site, open in the same browser, can send requests to a server on this machine. It
cannot read the answers unless its own name leads here (DNS rebinding), which the Host header shows;
and a request that changes something comes with the page's own Origin.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Serve `app` to requests whose Host is one of `hosts` (None: any), that come from its own
    pages, and that have the `token`, if there is one. `policy` is the Content-Security-Policy."""

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] | None, token: str | None, policy: str
    ) -> None:
        self.app, self.hosts, self.token = app, hosts, token
        # A browser gives a cookie to all ports of a machine, so other servers have other names.
        self._cookie = "mlsae_" + hashlib.sha256((token or "").encode()).hexdigest()[:16]
        self._headers = {
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope) if scope["type"] == "http" else _refuse("not served")
        await (refusal or self.app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """What a request is answered with that is not served; None if it is."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return _refuse(
                f"the page is at {' or '.join(sorted(self.hosts))}, and not at {host!r}; open the "
                "address that mlsae.app printed"
            )
        if self.token is not None and not self._has_token(headers):
            given = QueryParams(scope["query_string"])
            if scope["method"] == "GET" and self._equal(given.get("token", "")):
                return self._keep_token(scope["path"], given)
            return _refuse("a token is needed; open the address that mlsae.app printed")
        site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
        opened = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if origin is not None and urlsplit(origin).netloc != host:
            return _refuse(f"requests must come from the page itself, and not from {origin}")
        if site not in ("none", "same-origin") and not opened:
            return _refuse("requests must come from the page itself, and not from another site")
        return None

    def _has_token(self, headers: Headers) -> bool:
        kept = SimpleCookie()
        try:
            kept.load(headers.get("cookie", ""))
        except CookieError:
            return False
        own = kept[self._cookie].value if self._cookie in kept else ""
        sent = headers.get("authorization", "").removeprefix("Bearer ")
        return self._equal(own) | self._equal(sent)

    def _equal(self, given: str) -> bool:
        """Whether it is the token, told in a time that does not depend on where they differ."""
        return hmac.compare_digest(given.encode(), (self.token or "").encode())

    def _keep_token(self, path: str, given: QueryParams) -> Response:
        """Keep the token in the browser, and lead to the address without it."""
        rest = urlencode([(name, value) for name, value in given.multi_items() if name != "token"])
        # A path that begins with two slashes would lead to another host.
        answer = RedirectResponse("/" + path.lstrip("/") + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(self._cookie, given["token"], httponly=True, samesite="strict")
        return answer


def _name(host: str) -> str:
    """The name in a Host header, without its port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _refuse(why: str) -> Response:
    return JSONResponse({"error": why}, 403)
