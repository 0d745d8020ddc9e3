"""A stand-in for the Hugging Face hub on the loopback address: as much of it as huggingface_hub asks for."""

import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it has, what it wants of who asks, and what it was asked.

    Attributes:
        repositories: "org/name" -> file name -> its bytes.
        gated: repositories that take the token.
        cut: bytes after which the answer for a large file ends, once each; 0 never.
        hold: an event for which the rest of a large file waits.
        etag: what it says to be every file's, unless "".
        status: what it answers to everything, unless 0.
        sent: the bytes of files that have been sent.
        asked: (method, path, the Range header or None) of every request.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    large: int = 1 << 20
    cut: int = 0
    hold: threading.Event | None = None
    status: int = 0
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    etag: str = ""
    sent: int = 0
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.hub
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if hub.status:
            return self.reply(hub.status, {}, b"")
        path = self.path.partition("?")[0].replace("%2F", "/")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.answer_info(*found.groups())
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        return self.answer_file(*found.groups()) if found else self.reply(404, {}, b"")

    def may(self, repository: str) -> bool:
        right = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        return repository not in self.hub.gated or right

    def answer_info(self, repository: str, revision: str | None):
        if repository not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        if revision not in (None, "main", REVISION):
            return self.refuse(404, "RevisionNotFound")
        names = self.hub.repositories[repository]
        info = {"id": repository, "modelId": repository, "sha": REVISION, "tags": ["license:mit"]}
        info["siblings"] = [{"rfilename": name} for name in names]
        return self.reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def answer_file(self, repository: str, revision: str, name: str):
        if not self.may(repository):
            return self.refuse(401, "GatedRepo")
        data = self.hub.repositories.get(repository, {}).get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        whole, start = len(data), 0
        headers = {"X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if whole >= self.hub.large:
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(whole)}
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        headers |= {"X-Linked-ETag": self.hub.etag} if self.hub.etag else {}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        return self.reply(206 if start else 200, headers, data[start:])

    def refuse(self, status: int, code: str):
        self.reply(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def reply(self, status: int, headers: dict[str, str], body: bytes):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub, is_large = self.hub, len(body) >= self.hub.large
        end = hub.cut if is_large and hub.cut else len(body)
        for at in range(0, end, 1 << 16):
            if hub.hold and at >= 3 << 20:
                hub.hold.wait(30)
            piece = body[at : min(end, at + (1 << 16))]
            self.wfile.write(piece)
            hub.sent += len(piece) if "/resolve/" in self.path else 0
        if end < len(body):
            hub.cut = 0
            self.close_connection = True

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_):
        """Whoever asked has gone."""


def serve() -> tuple[Hub, Server]:
    """A hub without models, at `url`; `shutdown` the server at the end."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return hub, server
