"""A small server that speaks as much of the hub's API as reading a data set needs, and can fail."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `root/user/name/…` as the data set `user/name`.

    Attributes:
        reads: paths of files whose contents were asked for.
        answers_left: requests for contents that are answered before the next `failures`; None: all.
        failures: requests that are then refused with status 503.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root = root
        self.reads: list[str] = []
        self.answers_left: int | None = None
        self.failures = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fails_now(self) -> bool:
        if self.answers_left is None:
            return False
        self.answers_left -= 1
        if self.answers_left >= 0 or not self.failures:
            return False
        self.failures -= 1
        return True


class HubRequest(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: object, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def info(self, repo: str, file: Path) -> dict[str, object]:
        raw = file.read_bytes()
        name = str(file.relative_to(self.server.root / repo))
        return {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}

    def tree(self, repo: str, below: str, recursive: bool) -> list[dict[str, object]]:
        folder = self.server.root / repo / below
        entries = sorted(folder.rglob("*") if recursive else folder.glob("*"))
        root = self.server.root / repo
        return [
            self.info(repo, entry)
            if entry.is_file()
            else {"type": "directory", "path": str(entry.relative_to(root)), "size": 0, "oid": "0" * 40}
            for entry in entries
        ]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = {}
        if match := re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?$", path):
            repo, rest = match[1], match[2] or ""
            files = {str(f.relative_to(self.server.root / repo)): f for f in (self.server.root / repo).rglob("*.*")}
        if not files:
            self.reply_json({"error": "Repository not found"}, 404)
        elif found := re.match(r"/resolve/[^/]+/(.+)", rest):
            self.send_file(found[1], files.get(found[1]))
        elif found := re.match(r"/tree/[^/]+/?(.*)", rest):
            self.reply_json(self.tree(repo, found[1], "recursive=True" in self.path or "recursive=true" in self.path))
        elif re.match(r"(/revision/.+)?$", rest):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.reply_json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self.reply_json({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def send_file(self, name: str, file: Path | None) -> None:
        if file is None:
            self.reply(404, b"", X_Error_Code="EntryNotFound")
            return
        raw = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "Accept_Ranges": "bytes"}
        if self.command == "GET":
            self.server.reads.append(name)
            if self.server.fails_now():
                self.reply(503, b"try again later")
                return
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(raw) - 1), len(raw) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(raw)}"
            self.reply(206, raw[first : last + 1], **headers)
        else:
            self.reply(200, raw, **headers)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = re.match(r"/api/datasets/([^/]+/[^/]+)/paths-info/", unquote(self.path))
        if not match:
            self.reply_json({"error": "Not found"}, 404)
            return
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        paths = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]
        files = (self.server.root / match[1] / path for path in paths)
        self.reply_json([self.info(match[1], file) for file in files if file.is_file()])


@contextmanager
def serve(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
