"""What a request must not do, decided from its address and headers before any handler runs.

- Paths: no `..`, no absolute path, no backslash, no control character and no broken UTF-8, however often
  encoded, neither in the URL's path nor in a parameter that ends up in a file name.
- Sites: a page of another origin may not drive the server, since browsers send such requests unasked; and a
  server that listens on loopback is addressed by a loopback name only, against DNS rebinding.
- Endpoints that replace code or model files, or that make no sense for a model that needs a click.
- Requests that a proxy in front and this server could read differently: two lengths, or a change of protocol.

`Guard` also has browsers take every answer for what it says it is, show none within other sites' pages, and
ask no other host on behalf of the server's own. It turns an exception that a handler let through into an
answer with a sentence, and logs where it happened but not its text, which may name a patient's file.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import traceback
import unicodedata
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Translate = Callable[[Exception], "tuple[int, str] | None"]

_FILE_PARAMETERS = frozenset({"image", "images", "label", "id"})
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_SESSION_PATH = re.compile(r"/session/(.+)$")
_PROXIED = re.compile(r"/proxy/dicom(/|$)")
_DRIVE = re.compile(r"[A-Za-z]:")
_CHANGING = frozenset({"POST", "PUT", "DELETE", "PATCH"})
_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})
# File systems allow 255 bytes, of which a temporary name and an ending take some.
_MAX_NAME_BYTES = 200

_CLOSED = (
    ("PUT", re.compile(r"/model/"), "model files are not taken: quantize with POST /train/dfqsam"),
    ("DELETE", re.compile(r"/model/"), "model files are not deleted over the network"),
    ("POST", re.compile(r"/reload/?$"), "the app is not reloaded over the network: restart the server"),
    (
        "POST",
        re.compile(r"/batch/(?!infer/dfqsam_propose/?$)"),
        "batch inference needs a model without prompts: /batch/infer/dfqsam_propose",
    ),
    ("POST", re.compile(r"/infer/wsi"), "whole-slide inference is not offered: use /infer/dfqsam"),
)


class Refusal(Exception):
    """A request that is answered with `status` and the sentence `detail`."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def check_name(name: str, what: str) -> None:
    """Refuses a text that could lead out of the folder it is a file name in.

    Args:
        name: decoded once already.
        what: the parameter, for the message.

    Raises:
        Refusal: 400.
    """
    decoded = _decoded(name)
    separated = "/" in decoded or _is_tricky(decoded) or _DRIVE.match(decoded)
    if separated or decoded in (".", "..") or len(decoded.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise Refusal(
            400, f"{what} must be a plain name of at most {_MAX_NAME_BYTES} bytes, without any path"
        )


def check_tag(tag: str) -> None:
    """Refuses a label tag that is no plain word; raises Refusal 400."""
    if not _TAG.fullmatch(tag) or ".." in tag:
        raise Refusal(400, "tag must be a word of letters, digits, '_', '-' and '.'")


def check_session(session_id: str) -> None:
    """Refuses what cannot be a session's id; raises Refusal 400."""
    if not _SESSION.fullmatch(session_id):
        raise Refusal(400, "session_id must be the id that PUT /session/ answered")


def header(scope: Scope, name: str) -> str:
    """A request's header by its lower-case name; of several the first, '' when there is none."""
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")


class Guard:
    """ASGI middleware of the rules above."""

    def __init__(
        self,
        app: Application,
        origins: Iterable[str] = (),
        trusted_hosts: Iterable[str] = (),
        logins: Iterable[str] = (),
        translate: Translate = lambda error: None,
    ) -> None:
        """Wraps `app`.

        Args:
            origins: other origins whose pages may use the server, as browsers write them.
            trusted_hosts: names, beside loopback's own, that a server on loopback is addressed by.
            logins: origins that the server's own pages may ask, beside the server itself, to log people in.
            translate: status and sentence for a known exception, None for any other.
        """
        self._app = app
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        # Upstream's pages ask other hosts for fonts and scripts, which tells these who uses the server.
        pages = " ".join(["default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'", *sorted(logins)])
        frames = " ".join(["frame-ancestors 'self'", *sorted(self._origins)])
        self._answered_with = {
            b"x-content-type-options": b"nosniff",
            b"content-security-policy": f"{pages}; {frames}".encode(),
        }
        self._hosts = _LOOPBACK_NAMES | {host.lower() for host in trusted_hosts}
        self._translate = translate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {key.lower() for key, _ in message["headers"]}
                added = [pair for pair in self._answered_with.items() if pair[0] not in present]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if problem := _misframed(scope):
            await _reply(tracked, 400, problem, (b"connection", b"close"))
            return
        try:
            self.check(scope)
            await self._app(scope, receive, tracked)
        except Exception as error:
            if started:
                raise
            status, detail = self._answer(error)
            await _reply(tracked, status, detail)

    def check(self, scope: Scope) -> None:
        """Raises Refusal for a request that breaks a rule."""
        method, path = scope["method"], _decoded(scope["path"])
        if _is_tricky(path) or ".." in path.split("/") or "//" in path:
            raise Refusal(400, "the address must not contain '..', '//', backslashes or control characters")
        self._check_host(scope, header(scope, "host"))
        if method in _CHANGING:
            self._check_origin(header(scope, "origin") or None, header(scope, "host"))
        for closed_method, pattern, detail in _CLOSED:
            if method == closed_method and pattern.search(path):
                raise Refusal(403, detail)
        if found := _SESSION_PATH.search(path):
            check_session(found[1])
        if not _PROXIED.search(path):
            _check_parameters(scope, path)

    def _check_host(self, scope: Scope, host: str) -> None:
        server = scope.get("server")
        if server is None or not _is_loopback(server[0]):
            return
        name = urlsplit(f"//{host}").hostname or ""
        if name not in self._hosts and not _is_loopback(name):
            raise Refusal(403, "this server is addressed as 127.0.0.1 or localhost; see --conf trusted_hosts")

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or origin.lower() in self._origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(403, "pages of other origins may not use this server; see MONAI_LABEL_CORS_ORIGINS")

    def _answer(self, error: Exception) -> tuple[int, str]:
        if isinstance(error, Refusal):
            return error.status, error.detail
        known = self._translate(error)
        if known is not None:
            return known
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        logger.error("A request failed with %s:\n%s", type(error).__name__, where)
        logger.debug("The same with its text", exc_info=error)
        return 500, f"the server failed on this request ({type(error).__name__}); its log says where"


def _misframed(scope: Scope) -> str:
    """Why nobody can say where this request ends and the next one begins; '' for any usual one."""
    if header(scope, "transfer-encoding") and header(scope, "content-length"):
        return "a request has either Content-Length or Transfer-Encoding, not both"
    if header(scope, "upgrade").lower() == "websocket":
        return "there are no web sockets here"
    return ""


def _check_parameters(scope: Scope, path: str) -> None:
    parameters = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    session = next((value for key, value in parameters if key == "session_id" and value), "")
    if session:
        check_session(session)
    for key, value in parameters:
        # With a session, Slicer sends the volume's name as image, which is then not used as a file's name.
        if key in _FILE_PARAMETERS and not (session and "/infer/" in path):
            check_name(value, key)
        if key == "tag" and value:
            check_tag(value)


def _decoded(text: str) -> str:
    """Text with percent-encoding removed until nothing changes."""
    while (once := unquote(text)) != text:
        text = once
    return text


def _is_tricky(text: str) -> bool:
    """Whether a text holds a backslash, a control character, or what was not UTF-8."""
    return any(c in "\\\ufffd" or unicodedata.category(c) in ("Cc", "Cs") for c in text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _reply(send: Send, status: int, detail: str, *more: tuple[bytes, bytes]) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
