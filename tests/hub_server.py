"""A small Hub on loopback, in memory, for the real `huggingface_hub` and `datasets`: HF_ENDPOINT points them at it.

It has what these two ask for when they stream, download, create and push: whoami, repositories, commits and their
revisions, preupload, LFS, trees, refs and files by ranges. On demand it fails: see `Hub.fail`.

The protocol as the client speaks it: https://huggingface.co/docs/hub/api, https://github.com/git-lfs/git-lfs/tree/main/docs/api
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What git would not take: the Hub keeps these in its large file storage.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".tar", ".wav", ".flac")
LFS_BYTES = 10_000


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    type: str  # "model", "dataset"
    name: str
    private: bool = False
    refs: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def __post_init__(self):
        self.commit({}, "initial commit")

    def commit(self, files: dict[str, bytes], title: str, ref: str = "main") -> Commit:
        oid = hashlib.sha1(f"{self.name} {ref} {len(self.refs[ref])} {title}".encode()).hexdigest()
        self.refs[ref].append(Commit(oid, title, files))
        return self.refs[ref][-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((made for ref in self.refs.values() for made in ref if made.oid == revision), None)


@dataclass
class Fault:
    """Of requests whose "METHOD /path" has `pattern` in it, after the first `after`, so many `times`."""

    pattern: str
    status: int | None = 503
    times: float = float("inf")
    after: int = 0
    retry_after: float | None = None
    drop_at: int | None = None  # bytes of the body after which the connection is cut
    seconds: float = 0.0  # to wait before the answer; status None: then answer as usual
    met: int = 0  # how often it struck

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request) or self.times <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        self.met += 1
        return True


class Hub:
    """users: token -> (user, may write). `requests` are "METHOD /path", in the order of their arrival.

    after_commit: so many commits are taken; then, until it is None, everything is answered with 503.
    """

    def __init__(self):
        self.users = {"hf_writer": ("user", True), "hf_reader": ("user", False)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.after_commit: int | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, type: str, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        repo = self.repos.setdefault((type, name), Repo(type, name, private))
        repo.commit({**repo.refs["main"][-1].files, **files}, "files")
        return repo

    def fail(self, pattern: str, **settings) -> Fault:
        self.faults.append(Fault(pattern, **settings))
        return self.faults[-1]

    def files(self, name: str, revision: str = "main", type: str = "model") -> dict[str, bytes]:
        return self.repos[type, name].at(revision).files

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message, self.code, self.headers = status, message, code, headers


REPO = r"(?P<type>models|datasets)/(?P<name>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern, str]] = [
    (method, re.compile(pattern + "$"), name)
    for method, pattern, name in (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("GET", f"/api/{REPO}", "info"),
        ("GET", f"/api/{REPO}/revision/(?P<revision>.+)", "info"),
        ("GET", f"/api/{REPO}/refs", "refs"),
        ("GET", f"/api/{REPO}/commits/(?P<revision>.+)", "commits"),
        ("GET", f"/api/{REPO}/auth-check(?P<write>/write)?", "check"),
        ("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("POST", f"/api/{REPO}/paths-info/(?P<revision>[^/]+)", "paths"),
        ("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", f"/api/{REPO}/(?:branch|tag)/(?P<revision>.+)", "branch"),
        ("POST", r"/(?:(?P<type>datasets)/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "store"),
        ("GET", r"/(?:(?P<type>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        request, self.query = f"{self.command} {self.path}", parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if fault.strikes(request)), None)
        if fault is None and self.hub.after_commit == 0:
            fault = Fault("")
        if fault is not None:
            time.sleep(fault.seconds)
            if fault.drop_at is None and fault.status is not None:
                extra = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
                return self.answer(fault.status, b'{"error": "made to fail"}', extra)
        try:
            for wanted, pattern, name in ROUTES:
                if wanted == method and (found := pattern.match(url.path)):
                    parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    status, body, extra = getattr(self, f"on_{name}")(**parts)
                    break
            else:
                raise Refused(404, f"no such route: {request}")
        except Refused as refused:
            extra = {"X-Error-Message": refused.message, **refused.headers}
            extra |= {"X-Error-Code": refused.code} if refused.code else {}
            return self.answer(refused.status, json.dumps({"error": refused.message}).encode(), extra)
        self.answer(status, body, extra, fault.drop_at if fault else None)

    def answer(self, status: int, body: bytes, extra: dict[str, str], drop_at: int | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **extra}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop_at])
        if drop_at is not None:
            self.wfile.flush()
            self.close_connection = True

    # ---- who asks, and for what

    def user(self) -> tuple[str | None, bool]:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not token:
            return None, False
        if token not in self.hub.users:
            raise Refused(401, "Invalid username or password.")
        return self.hub.users[token]

    def repo(self, type: str, name: str, writes: bool = False) -> Repo:
        repo, (user, may_write) = self.hub.repos.get((type.rstrip("s"), name)), self.user()
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "Repository Not Found", "RepoNotFound")
        if writes and (user != name.split("/")[0] or not may_write):
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repo

    def commit_at(self, type: str, name: str, revision: str = "main") -> Commit:
        commit = self.repo(type, name).at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- answers: (status, body, headers)

    def on_whoami(self):
        user, may_write = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if may_write else "read"
        token = {"displayName": "test", "role": role}
        return as_json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}})

    def on_create(self):
        (user, may_write), asked = self.user(), json.loads(self.body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not may_write or name.split("/")[0] != user:
            raise Refused(
                403, f'You don\'t have the rights to create a model under the namespace "{name.split("/")[0]}"'
            )
        key = (asked.get("type") or "model", name)
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        told = {"url": f"{self.hub.url}/{prefix}{name}", "name": name}
        if key in self.hub.repos:
            return 409, json.dumps({"error": "You already created this model repo", **told}).encode(), {}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[key] = Repo(*key, private=private)
        return as_json(told)

    def on_validate(self):
        """The metadata of a card: what the Hub would refuse."""
        found = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else {}
        errors = [{"message": f"{key} is empty"} for key, value in metadata.items() if value in (None, "", [])]
        for entry in metadata.get("model-index", []):
            for result in entry["results"]:
                if not {"task", "dataset", "metrics"} <= set(result) or "type" not in result["dataset"]:
                    errors.append({"message": "a result needs task, dataset (with its type) and metrics"})
        return 400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode(), {}

    def on_info(self, type: str, name: str, revision: str = "main"):
        repo, commit = self.repo(type, name), self.commit_at(type, name, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        told = {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}
        return as_json(
            {**told, "_id": "0", "modelId": name, "disabled": False, "gated": False, "downloads": 0, "likes": 0}
        )

    def on_refs(self, type: str, name: str):
        refs = self.repo(type, name).refs.items()
        branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": made[-1].oid} for ref, made in refs]
        return as_json({"branches": branches, "converts": [], "tags": []})

    def on_commits(self, type: str, name: str, revision: str):
        made = self.repo(type, name).refs.get(revision, [])
        when = "2026-01-01T00:00:00.000Z"
        told = [{"id": each.oid, "title": each.title, "message": "", "date": when, "authors": []} for each in made]
        return as_json(told[::-1])

    def on_check(self, type: str, name: str, write: str | None = None):
        self.repo(type, name, writes=write is not None)
        return as_json({})

    def on_tree(self, type: str, name: str, revision: str, path: str = ""):
        files, inside = self.commit_at(type, name, revision).files, path.strip("/") and path.strip("/") + "/"
        below = {file: body for file, body in files.items() if file.startswith(inside)}
        if inside and not below:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {
            inside + "/".join(parts[: depth + 1])
            for file in below
            for parts in [file[len(inside) :].split("/")]
            for depth in range(len(parts) - 1)
        }
        near = [file for file in below if recursive or "/" not in file[len(inside) :]]
        near_folders = [folder for folder in folders if recursive or "/" not in folder[len(inside) :]]
        told = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in near_folders]
        return as_json(sorted(told + [about(file, below[file]) for file in near], key=lambda item: item["path"]))

    def on_paths(self, type: str, name: str, revision: str):
        files = self.commit_at(type, name, revision).files
        asked = parse_qs(self.body.decode()).get("paths", [])
        told = [about(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path.rstrip('/')}/") for file in files)]
        return as_json(told + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders])

    def on_preupload(self, type: str, name: str, revision: str):
        self.repo(type, name, writes=True)
        asked = json.loads(self.body)["files"]
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
            }
            for file in asked
        ]
        return as_json({"files": told})

    def on_batch(self, name: str, type: str = "models"):
        self.repo(type, name, writes=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.large else {"actions": upload})})
        return as_json({"transfer": "basic", "objects": objects})

    def on_store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not that of its name")
        self.hub.large[oid] = self.body
        return 200, b"", {}

    def on_commit(self, type: str, name: str, revision: str):
        repo = self.repo(type, name, writes=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            files, title = dict(repo.refs[revision][-1].files), ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    title = value["summary"]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise Refused(400, f"{value['path']} was never uploaded")
                    files[value["path"]] = self.hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
                elif line["key"] == "deletedFolder":
                    files = {path: body for path, body in files.items() if not path.startswith(value["path"])}
            made = repo.commit(files, title, revision)
            if self.hub.after_commit:
                self.hub.after_commit -= 1
        return as_json(
            {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid, "success": True}
        )

    def on_branch(self, type: str, name: str, revision: str):
        repo = self.repo(type, name, writes=True)
        if revision in repo.refs:
            raise Refused(409, f"Reference already exists: {revision}")
        start = repo.at(json.loads(self.body or b"{}").get("startingPoint") or "main")
        repo.refs[revision] = [start]
        return as_json({})

    def on_resolve(self, name: str, revision: str, path: str, type: str = "models"):
        commit = self.commit_at(type, name, revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        body = commit.files[path]
        large = is_large(path, len(body))
        etag = hashlib.sha256(body).hexdigest() if large else git_oid(body)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"Content-Type": "application/octet-stream"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        asked = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, body, headers
        first, last = asked.groups()
        start = int(first) if first else max(len(body) - int(last), 0)
        stop = min(int(last) + 1, len(body)) if first and last else len(body)
        if start >= len(body):
            return 416, b"", {"Content-Range": f"bytes */{len(body)}"}
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return 206, body[start:stop], headers


def as_json(value) -> tuple[int, bytes, dict]:
    return 200, json.dumps(value).encode(), {}


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES)


def git_oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def about(path: str, body: bytes) -> dict:
    told = {"type": "file", "oid": git_oid(body), "size": len(body), "path": path}
    if is_large(path, len(body)):
        told["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return told
