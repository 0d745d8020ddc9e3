"""Who may ask, how much and how slowly, and what becomes of errors: one line, in OpenAI's form."""

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Iterable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..errors import Cancelled, TinyllamaError, printable
from ..machine.limits import human
from ..machine.terminal import say
from ..texts.openai import Refused, read_object
from .engine import Busy, Ending, Failed, Gone

LARGEST_BODY = 4_000_000  # bytes
BODIES = 64_000_000  # bytes of all that are being read
BODY_SECONDS = 30.0  # in which a body arrives
GONE = 499  # the client, as nginx has it: nobody gets this answer
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
STATUSES = ((Refused, 400), (Busy, 429), (Ending, 503), (Gone, GONE), (Cancelled, 503), (Failed, 500))
STATUSES += ((TinyllamaError, 400),)


def as_json(body: dict, status: int = 200, headers: dict | None = None) -> Response:
    """An answer. What JSON or UTF-8 doesn't have, half a character, say, goes as an escape."""
    return Response(json.dumps(body, allow_nan=False), status, headers, "application/json")


def failure(
    status: int, message: str, param: str | None = None, code: str | None = None, **headers
) -> Response:
    """An error."""
    about = {"type": KINDS.get(status, "invalid_request_error"), "param": param, "code": code}
    return as_json({"error": {"message": printable(message), **about}}, status, headers)


def of_exception(error: Exception) -> Response:
    """What is answered where something was raised."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=GONE)
    if isinstance(error, HTTPException):
        return failure(error.status_code, error.detail, **(error.headers or {}))
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    message = (
        str(error) if isinstance(error, TinyllamaError) else "the server has made a mistake; its log has it"
    )
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return failure(status, message, getattr(error, "param", None), getattr(error, "code", None), **headers)


async def as_answer(request: Request, error: Exception) -> Response:
    """A handler of exceptions, for Starlette."""
    return of_exception(error)


class Body(dict):
    """What a body says, and how many bytes it had; see Bodies."""

    size = 0


class Bodies:
    """Reads bodies, up to so many bytes of each, and of all together that are read and not released."""

    def __init__(self):
        self._held = 0

    async def read(self, request: Request) -> Body:
        """The object that a body is, to be released. Raises HTTPException, Refused and Busy."""
        data, length = bytearray(), request.headers.get("content-length", "0")
        too_large = HTTPException(
            413, f"the body has more than {human(LARGEST_BODY)}", {"Connection": "close"}
        )
        if not length.isdecimal() or len(length) > 12 or int(length) > LARGEST_BODY:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    self._held += len(chunk)
                    if len(data) > LARGEST_BODY:
                        raise too_large
                    if self._held > BODIES:
                        raise Busy("too many large requests are arriving: try again later")
            body = Body(read_object(bytes(data)))
        except TimeoutError:
            self._held -= len(data)
            late = f"the body hasn't arrived in {BODY_SECONDS:g} seconds"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        except BaseException:
            self._held -= len(data)
            raise
        body.size = len(data)
        return body

    def release(self, body: Body) -> None:
        """Forget a body once it has been understood: what it asks for may take long. Twice is fine."""
        self._held, body.size = self._held - body.size, 0
        body.clear()


class Guard:
    """Around all that is answered: refuses who may not ask, and tells what was asked and answered.

    Args:
        app: what answers.
        api_key: what those must know who ask for more than `open_paths`; None: everybody may.
        open_paths, static: what everybody may have: paths, and what they begin with.
        hosts: the names under which a browser may reach the server; None: all. A page elsewhere whose name
            was made to lead here (DNS rebinding) has another.
        told: called with path, status and seconds of each answer.
    """

    def __init__(
        self,
        app: Callable,
        api_key: str | None,
        hosts: Iterable[str] | None,
        told: Callable,
        open_paths: Iterable[str] = (),
        static: str = "/static/",
    ):
        self._app, self._key, self._told = app, api_key and f"Bearer {api_key}".encode(), told
        self._hosts, self._open = hosts and {host.lower() for host in hosts}, frozenset(open_paths)
        self._static = static

    async def __call__(self, scope, receive, send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), GONE

        async def noted(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - started
            self._told(scope["path"], status, seconds)
            client, path = (scope["client"] or ["?"])[0], printable(scope["path"])[:100]
            say(f"{client} {scope['method'][:20]} {path} {status} {seconds:.2f} s")

    def _refusal(self, scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._hosts and name not in self._hosts:
            return failure(403, f"this server isn't {host[:80]!r}: the header Host must name {LOOPBACK[0]}")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            return failure(403, f"pages of {origin[:80]!r} may not ask this server")
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = scheme.title() + b" " + key if key else scheme
        is_open = scope["path"] in self._open or scope["path"].startswith(self._static)
        if self._key and not is_open and not hmac.compare_digest(given, self._key):
            about = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            return failure(401, about, None, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})
        return None
