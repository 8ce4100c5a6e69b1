"""A small server with as much of the hub's API as the recipe needs, which fails on demand.

Data sets are folders that can be read. Model repositories live in memory: created, pushed to (regular files and LFS, no
Xet: clients need HF_HUB_DISABLE_XET=1), tagged, read back at any revision, by tokens with or without the right to
write. It listens on loopback.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".pt", ".png")


@dataclass
class Fault:
    """A failure of some requests.

    Attributes:
        kind: a status to answer with, `hang` (never answer) or `cut` (close the connection half-way through the body of
            an upload or, for a download, of the answer).
        request: regular expression that is searched in `METHOD /path`.
        after: number of such requests that are served before the first that fails.
        times: number of such requests that then fail; later ones are served again.
    """

    kind: int | Literal["hang", "cut"]
    request: str = ""
    after: int = 0
    times: int = 1_000_000

    def strikes(self, request: str) -> bool:
        if not self.times or not re.search(self.request, request):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Repo:
    """A model repository: commits are dictionaries from path to contents, `refs` from branch or tag to commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches[branch] = files, message, oid
        return oid

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or a commit names, if there is one."""
        commit = (self.branches | self.tags).get(revision, revision)
        return commit if commit in self.commits else None


class HubServer(ThreadingHTTPServer):
    """Serves `root/user/name/…` as the data set `user/name`, and models from memory.

    Attributes:
        reads: paths of the data set files whose contents were requested.
        requests: all requests so far, as `METHOD /path`.
        faults: failures to make, of which the first that strikes decides.
        tokens: name, role (`read` or `write`) and organisations of the user of each valid token.
        repos: models by id.
        seconds_per_megabyte: least time for an upload, as on a slow line.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root = root
        self.reads: list[str] = []
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.tokens: dict[str, tuple[str, str, list[str]]] = {"hf_write": ("ann", "write", ["lab"])}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.seconds_per_megabyte = 0.0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Keep silent about connections that were cut."""


def git_oid(raw: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


class HubRequest(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body)), "X_Repo_Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value: object, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.reply(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **headers)

    # All requests.

    def answer(self) -> None:
        self.path = unquote(self.path)
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(request)
            fault = next((fault for fault in self.server.faults if fault.strikes(request)), None)
        self.is_cut = fault is not None and fault.kind == "cut"
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.kind == "hang":
            self.server.closing.wait()
        elif self.is_cut and length:
            self.rfile.read(length // 2)
        if fault and (fault.kind == "hang" or (self.is_cut and self.command != "GET")):
            self.close_connection = True
            return
        body = self.read_body(length)
        if fault and not self.is_cut:
            self.refuse(fault.kind, "the server fails on demand")
        elif re.match(r"/(api/)?datasets/", path):
            self.answer_dataset(path, body)
        else:
            with self.server.lock:
                self.answer_model(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self, length: int) -> bytes:
        time.sleep(length / 1e6 * self.server.seconds_per_megabyte)
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send_contents(self, raw: bytes, **headers: str) -> None:
        """Send a file, or the requested range of it; only the first half if the connection is to be cut."""
        headers = {"Accept_Ranges": "bytes"} | headers
        status, first, last = 200, 0, len(raw) - 1
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, first, last = 206, int(asked[1]), min(int(asked[2] or last), last)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(raw)}"
        part = raw[first : last + 1]
        if self.is_cut:
            self.reply(status, part[: len(part) // 2], **headers, Content_Length=str(len(part)))
            self.close_connection = True
        else:
            self.reply(status, part, **headers)

    # Data sets, from files.

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

    def answer_dataset(self, path: str, body: bytes) -> None:
        files, repo, rest = {}, "", ""
        if match := re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?$", path):
            repo, rest = match[1], match[2] or ""
            files = {str(f.relative_to(self.server.root / repo)): f for f in (self.server.root / repo).rglob("*.*")}
        if not files:
            self.reply_json({"error": "Repository not found"}, 404)
        elif self.command == "POST" and rest.startswith("/paths-info/"):
            self.reply_json([self.info(repo, files[name]) for name in asked_paths(body) if name in files])
        elif found := re.match(r"/resolve/[^/]+/(.+)", rest):
            if found[1] not in files:
                self.reply(404, b"", X_Error_Code="EntryNotFound")
                return
            if self.command == "GET":
                self.server.reads.append(found[1])
            raw = files[found[1]].read_bytes()
            self.send_contents(raw, ETag=f'"{hashlib.sha1(raw).hexdigest()}"')
        elif found := re.match(r"/tree/[^/]+/?(.*)", rest):
            self.reply_json(self.tree(repo, found[1], "recursive=True" in self.path or "recursive=true" in self.path))
        elif re.match(r"(/revision/.+)?$", rest):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.reply_json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self.reply_json({"error": "Entry not found"}, 404)

    # Models, from memory.

    def answer_model(self, path: str, body: bytes) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.server.tokens.get(token)
        if path.startswith("/lfs/"):  # needs no token, like a bucket with signed addresses
            self.store_object(path.removeprefix("/lfs/"), body)
        elif token and user is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        elif path == "/api/whoami-v2":
            self.send_user(user)
        elif path == "/api/validate-yaml":
            self.reply_json({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self.create_repo(user, json.loads(body))
        elif match := re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git/info)?(/.*)?$", path):
            self.answer_repo(user, match[1], match[2] or "", body)
        else:
            self.refuse(404, "Not found")

    def send_user(self, user: tuple[str, str, list[str]] | None) -> None:
        if user is None:
            self.refuse(401, "Invalid username or password.")
            return
        name, role, organisations = user
        self.reply_json(
            {
                "type": "user",
                "name": name,
                "orgs": [{"name": organisation} for organisation in organisations],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
        )

    def may_write(self, user: tuple[str, str, list[str]] | None, repo_id: str) -> bool:
        return user is not None and user[1] == "write" and repo_id.split("/")[0] in (user[0], *user[2])

    def create_repo(self, user: tuple[str, str, list[str]] | None, asked: dict[str, str | None]) -> None:
        repo_id = f"{asked.get('organization') or (user or ['?'])[0]}/{asked['name']}"
        if not self.may_write(user, repo_id):
            self.refuse(403, "You don't have the rights to create a model under this namespace")
        elif repo_id in self.server.repos:
            self.reply_json(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}, 409
            )
        else:
            repo = self.server.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
            repo.commit("main", {".gitattributes": b""}, "initial commit")
            self.reply_json({"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def answer_repo(self, user: tuple[str, str, list[str]] | None, repo_id: str, rest: str, body: bytes) -> None:
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or repo_id.split("/")[0] not in (user[0], *user[2]))):
            self.refuse(404 if user else 401, "Repository not found", "RepoNotFound")
            return
        verb, _, argument = rest.strip("/").partition("/")
        writes = self.command in ("POST", "DELETE") and verb != "paths-info"
        if writes and not self.may_write(user, repo_id):
            self.refuse(403, "Forbidden: you must use a write token to write to this repository")
        elif verb == "refs":
            self.send_refs(repo)
        elif verb == "branch":
            self.refuse(409, "Reference already exists") if argument in repo.branches else self.add_branch(
                repo, argument
            )
        elif verb == "tag":
            self.change_tag(repo, argument, body)
        elif verb == "lfs":
            self.offer_uploads(body)
        else:
            revision, _, name = argument.partition("/")
            commit = repo.find(revision or "main")
            if commit is None:
                self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            else:
                self.answer_revision(repo_id, repo, verb, commit, revision, name, body)

    def send_refs(self, repo: Repo) -> None:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]

        branches, tags = listed("heads", repo.branches), listed("tags", repo.tags)
        self.reply_json({"branches": branches, "tags": tags, "converts": []})

    def add_branch(self, repo: Repo, name: str) -> None:
        repo.branches[name] = repo.branches["main"]
        self.reply_json({})

    def change_tag(self, repo: Repo, argument: str, body: bytes) -> None:
        if self.command == "DELETE":
            found = repo.tags.pop(argument, None)
            self.reply_json({}) if found else self.refuse(404, "no such tag", "RevisionNotFound")
            return
        tag, commit = json.loads(body)["tag"], repo.find(argument)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {argument}", "RevisionNotFound")
        elif tag in repo.tags:
            self.refuse(409, "Tag reference exists already")
        else:
            repo.tags[tag] = commit
            self.reply_json({})

    def offer_uploads(self, body: bytes) -> None:
        objects = []
        for requested in json.loads(body)["objects"]:
            action = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{requested['oid']}"}}}
            objects.append(requested | ({} if requested["oid"] in self.server.objects else action))
        self.reply_json({"transfer": "basic", "objects": objects})

    def store_object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "the contents do not match their checksum")
            return
        self.server.objects[oid] = body
        self.reply(200, b"")

    def answer_revision(
        self, repo_id: str, repo: Repo, verb: str, commit: str, revision: str, name: str, body: bytes
    ) -> None:
        files = repo.commits[commit]
        if verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.reply_json({"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []})
        elif verb == "tree":
            self.reply_json([describe(path, raw) for path, raw in files.items() if path.startswith(name)])
        elif verb == "paths-info":
            self.reply_json([describe(path, files[path]) for path in asked_paths(body) if path in files])
        elif verb == "preupload":
            self.reply_json({"files": [upload_mode(file, files) for file in json.loads(body)["files"]]})
        elif verb == "commit":
            self.add_commit(repo_id, repo, revision, dict(files), body)
        elif verb == "resolve" and name in files:
            raw = files[name]
            described = describe(name, raw)
            headers = {"ETag": f'"{described["lfs"]["oid"] if "lfs" in described else described["oid"]}"'}
            self.send_contents(raw, **headers, X_Repo_Commit=commit)
        else:
            self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)

    def add_commit(self, repo_id: str, repo: Repo, branch: str, files: dict[str, bytes], body: bytes) -> None:
        message = ""
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.server.objects:
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                self.refuse(400, f"cannot commit {key} {value['path']}")
                return
        oid = repo.commit(branch, files, message)
        self.reply_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})


def asked_paths(body: bytes) -> list[str]:
    asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
    return asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]]


def describe(path: str, raw: bytes) -> dict[str, object]:
    """Describe a file of a model repository as the hub lists it."""
    described: dict[str, object] = {"type": "file", "path": path, "size": len(raw), "oid": git_oid(raw)}
    if path.endswith(LFS_SUFFIXES):
        described["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}
    return described


def upload_mode(asked: dict[str, str], files: dict[str, bytes]) -> dict[str, object]:
    path = asked["path"]
    is_lfs = path.endswith(LFS_SUFFIXES)
    oid = None
    if path in files:
        oid = hashlib.sha256(files[path]).hexdigest() if is_lfs else git_oid(files[path])
    return {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serve(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
