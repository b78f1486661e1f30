"""A Hub on 127.0.0.1: as much of the Hugging Face Hub's API as huggingface_hub uses to push and load models.

It keeps repositories, commits and branches in memory, knows users by their tokens, and fails on demand.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

# Above this size, and all weights whatever their size, files go the way of large files
LFS_BYTES = 1_000_000


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        sha = hashlib.sha1(f"{branch}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Failure:
    """What shall go wrong: `times` requests whose `METHOD path` matches get this status, or a dropped connection."""

    pattern: str
    times: int
    status: int | None = None


class Hub:
    """The state. `users`: token -> user; a token in `readers` may only read. `orgs`: user -> organizations.

    Files of the repositories in `spoiled` are sent with another last byte than the one announced.
    """

    def __init__(self) -> None:
        self.users = {"token-of-me": "me", "token-of-you": "you"}
        self.readers: set[str] = set()
        self.spoiled: set[str] = set()
        self.orgs = {"me": ["club"]}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.lock = Lock()
        self.url = ""

    def next_failure(self, request: str) -> Failure | None:
        for failure in self.failures:
            if failure.times > 0 and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    def names(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repos[repo_id].files(revision))


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A reply is sent in two parts, and the second would wait 40 ms for the client
    disable_nagle_algorithm = True
    hub: Hub

    # -- HTTP

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.path, _, self.query = self.path.partition("?")
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        if request in ("POST /fail", "POST /heal"):
            # For clients that push under several failures, one after the other
            failure = Failure(**json.loads(self.read_body()))
            self.hub.failures = [*self.hub.failures, failure] if request == "POST /fail" else []
            return self.reply({})
        failure = self.hub.next_failure(request)
        if failure is not None and failure.status is None:
            # In the middle of what the client sends
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return None
        body = self.read_body()
        try:
            if failure is not None:
                raise _Refused(failure.status, "made to fail")
            with self.hub.lock:
                return self.route(urlsplit(self.path).path, body)
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused)}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            if refused.commit:
                headers["X-Repo-Commit"] = refused.commit
            self.reply({"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        values = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in values.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self, path: str, body: bytes) -> None:
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else self.command):
                return answer(self, body, *map(unquote, match.groups()))
        raise _Refused(404, f"no such address: {self.command} {path}")

    # -- who may do what

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def user(self) -> str:
        if self.token not in self.hub.users:
            raise _Refused(401, "Invalid username or password.")
        return self.hub.users[self.token]

    def readable(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        hidden = repo is not None and repo.private and not self.may_write(repo_id, reading=True)
        if repo is None or hidden:
            raise _Refused(401 if self.token is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, repo_id: str) -> Repo:
        repo = self.readable(repo_id)
        self.user()
        if not self.may_write(repo_id):
            raise _Refused(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def may_write(self, repo_id: str, reading: bool = False) -> bool:
        user = self.hub.users.get(self.token)
        owners = [user, *self.hub.orgs.get(user, [])]
        return repo_id.partition("/")[0] in owners and (reading or self.token not in self.hub.readers)

    def revision(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise _Refused(404, "Revision not found", "RevisionNotFound")
        return sha

    # -- what it answers

    def whoami(self, body: bytes) -> None:
        user = self.user()
        self.reply({"type": "user", "name": user, "orgs": [{"name": name} for name in self.hub.orgs.get(user, [])]})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.user()
        repo_id = f"{owner}/{asked['name']}"
        self.user()
        if not self.may_write(repo_id):
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        exists = repo_id in self.hub.repos
        if not exists:
            repo = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
            self.hub.repos[repo_id] = repo
        self.reply({"url": f"{self.hub.url}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        local = re.search(r"^base_model:\s*/", text, re.MULTILINE)
        errors = [{"message": '"base_model" with value a path is not valid'}] if local else []
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    @property
    def opens_pull_request(self) -> bool:
        return "create_pr" in parse_qs(self.query)

    def target(self, repo_id: str) -> Repo:
        """The repository of a commit: anybody who reads it may open a pull request."""
        self.user()
        return self.readable(repo_id) if self.opens_pull_request else self.writable(repo_id)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self.target(repo_id)
        there = repo.files(self.revision(repo, revision))
        answers = []
        for file in json.loads(body)["files"]:
            large = file["size"] > LFS_BYTES or file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in there:
                old = there[file["path"]]
                answer["oid"] = old.sha256 if old.lfs else old.blob_id
            answers.append(answer)
        self.reply({"files": answers})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.user()
        self.readable(repo_id)
        objects = []
        for entry in json.loads(body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.large:
                link = f"{self.hub.url}/lfs/{entry['oid']}"
                answer["actions"] = {"upload": {"href": link}, "verify": {"href": f"{link}/verify"}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "another content than announced")
        self.hub.large[oid] = body
        self.reply({})

    def lfs_verify(self, body: bytes, oid: str) -> None:
        if len(self.hub.large.get(oid, b"")) != json.loads(body)["size"]:
            raise _Refused(404, "not stored")
        self.reply({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self.target(repo_id)
        files = dict(repo.files(self.revision(repo, revision)))
        message = ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            elif entry["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        sha = repo.commit(f"refs/pr/{number}" if self.opens_pull_request else revision, files, message)
        address = f"{self.hub.url}/{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{address}/commit/{sha}"}
        if self.opens_pull_request:
            answer["pullRequestUrl"] = f"{address}/discussions/{number}"
        self.reply(answer)

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repo = self.writable(repo_id)
        if name in repo.branches:
            raise _Refused(409, "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self.reply({})

    def auth_check(self, body: bytes, repo_id: str) -> None:
        self.readable(repo_id)
        self.reply({})

    def auth_check_write(self, body: bytes, repo_id: str) -> None:
        self.writable(repo_id)
        self.reply({})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repo = self.readable(repo_id)
        sha = self.revision(repo, revision)
        siblings = []
        for path, file in repo.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in parse_qs(self.query):
                entry |= {"size": len(file.content), "blobId": file.blob_id}
                if file.lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 130}
            siblings.append(entry)
        self.reply({"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str = "") -> None:
        repo = self.readable(repo_id)
        files = repo.commits[self.revision(repo, revision)]
        entries = []
        for path, file in files.items():
            if path.startswith(folder):
                lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
                entries.append({**entry, **({"lfs": lfs} if file.lfs else {})})
        if folder and not entries:
            raise _Refused(404, "no such folder", "EntryNotFound")
        self.reply(entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self.readable(repo_id)
        sha = self.revision(repo, revision)
        file = repo.commits[sha].get(path)
        if file is None:
            raise _Refused(404, "Entry not found", "EntryNotFound", sha)
        etag = file.sha256 if file.lfs else file.blob_id
        content = file.content
        if repo_id in self.hub.spoiled and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.reply(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": sha})


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("POST", r"/lfs/(\w+)/verify", _Handler.lfs_verify),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", _Handler.branch),
    ("GET", rf"/api/models/{_ID}/auth-check", _Handler.auth_check),
    ("GET", rf"/api/models/{_ID}/auth-check/write", _Handler.auth_check_write),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)/(.+)", _Handler.tree),
    ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers at `hub.url` while the `with` lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
