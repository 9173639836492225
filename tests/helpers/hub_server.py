"""A Hub on loopback, for the real client of `huggingface_hub`: models and datasets in memory, and faults on demand.

It answers the requests that creating, committing, listing and downloading send, with LFS for large files and without
Xet. Clients read their endpoint when they are imported, so they run in a process of their own (`HubServer.run`); for
code that makes its own `HfApi`, `HubServer.connect` is enough.

    hub.add_file("dataset", "org/scans", "valid/a.nii.gz", content)
    hub.fail("GET .*a.nii.gz", status=503, times=2)  # the next two such requests
    hub.cut_answer("GET .*a.nii.gz", after_bytes=1000)  # the one after them breaks off
    hub.run("from huggingface_hub import ...", home=tmp_path)
    assert hub.count("GET .*a.nii.gz") == 3
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml
from hub_repos import Blob, Repo
from launching import QUICKLY

OWNER, READER = "hf_owner", "hf_reader"
"""Tokens: the first may do everything, the second reads what is neither private nor gated."""
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unknown", "other"}

WITHOUT_MEDCT = """
import sys
sys.modules["medct"] = None  # any import of it fails
"""
# Waits are printed, not slept through.
WITHOUT_WAITS = """
import time
time.sleep = lambda seconds: print(f"waits {seconds:g}", flush=True)
"""


@dataclasses.dataclass
class Fault:
    """What happens to the next requests that match."""

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: str | None = None  # "upload" or "answer"
    after_bytes: int = 0


class HubError(Exception):
    """An error response, worded as the Hub's own."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class ConnectionCutError(Exception):
    """The connection ends here, without an answer."""


class HubServer:
    """The Hub: repositories, faults and a log of requests.

    Attributes:
        repos: By type ("model", "dataset") and id.
        requests: One line for each request, `METHOD /path?query`.
        lfs_from_bytes: Files of at least this many bytes go through LFS.
        tree_page_size: Entries on one page of a listing.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.large_files: dict[str, bytes] = {}
        self.lfs_from_bytes = 100_000
        self.tree_page_size = 1000
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # what it holds

    def repo(self, repo_type: str, repo_id: str) -> Repo:
        return self.repos[repo_type, repo_id]

    def create(self, repo_type: str, repo_id: str, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id, private))
        repo.gated = gated or repo.gated
        return repo

    def add_file(self, repo_type: str, repo_id: str, path: str, content: bytes) -> str:
        """Put a file into a repository, made if need be; returns the commit."""
        return self.add_files(repo_type, repo_id, {path: content})

    def add_files(self, repo_type: str, repo_id: str, files: dict[str, bytes]) -> str:
        """Put several files into a repository in one commit."""
        with self.lock:
            repo = self.create(repo_type, repo_id)
            blobs = {path: Blob(content, self.is_large(path, len(content))) for path, content in files.items()}
            return repo.commit("main", "add files", repo.head.files | blobs).sha

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What a repository holds now."""
        return {path: blob.content for path, blob in self.repo(repo_type, repo_id).head.files.items()}

    def is_large(self, path: str, size: int) -> bool:
        return size > 0 and (size >= self.lfs_from_bytes or path.endswith((".safetensors", ".bin", ".parquet", ".gz")))

    # faults and the log of requests

    def fail(self, pattern: str, status: int, times: int = 1, retry_after: int | None = None) -> None:
        """Answer the next `times` requests whose log line matches with an error."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self.faults.append(Fault(pattern, times, status, headers))

    def cut_upload(self, pattern: str, after_bytes: int, times: int = 1) -> None:
        """Break the connection after this many bytes of the request's body; nothing is done."""
        self.faults.append(Fault(pattern, times, cut="upload", after_bytes=after_bytes))

    def cut_answer(self, pattern: str, after_bytes: int = 0, times: int = 1) -> None:
        """Do what is asked, but break the connection after this many bytes of the response's body."""
        self.faults.append(Fault(pattern, times, cut="answer", after_bytes=after_bytes))

    def count(self, pattern: str) -> int:
        """Requests so far whose log line matches."""
        return sum(re.match(pattern, line) is not None for line in self.requests)

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            self.requests.append(line)
            fault = next((fault for fault in self.faults if fault.times and re.match(fault.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    # clients

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """Environment variables that point a client to this Hub and away from any other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return kept | ours | QUICKLY | ({} if token is None else {"HF_TOKEN": token})

    def run(
        self, code: str, *arguments: object, home: Path, token: str | None = OWNER, medct: bool = True
    ) -> subprocess.CompletedProcess:
        """Run Python code as a client in a process of its own.

        Args:
            code: Finds `arguments` in `sys.argv[1:]`.
            arguments: Become strings.
            home: Empty folder, for the client's cache; also the working directory.
            token: The client's token; `None` for an anonymous client.
            medct: Whether `import medct` works there.
        """
        home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", ("" if medct else WITHOUT_MEDCT) + code, *map(str, arguments)]
        environment = self.environment(home, token)
        return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=home, env=environment, check=False)

    def connect(self, monkeypatch: pytest.MonkeyPatch, token: str | None = OWNER) -> None:
        """Point the clients that this process makes from now on to this Hub."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for all calls
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)


REVISION = r"(?P<revision>[^/]+)"
API = r"/api/(?P<types>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", API + "/preupload/" + REVISION, "preupload"),
    ("POST", API + "/commit/" + REVISION, "commit"),
    ("POST", API + "/paths-info/" + REVISION, "paths_info"),
    ("GET", API + "/tree/" + REVISION + r"(?:/(?P<path>.*))?", "tree"),
    ("GET", API + "/commits/" + REVISION, "commits"),
    ("GET", API + "/refs", "refs"),
    ("(POST|DELETE)", API + r"/(?P<kind>tag|branch)/" + REVISION, "ref"),
    ("GET", API + "(?:/revision/" + REVISION + ")?", "info"),
    ("POST", r"/(?P<types>datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (
        "(GET|HEAD)",
        r"/(?P<types>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/" + REVISION + "/(?P<path>.+)",
        "resolve",
    ),
)


class HubHandler(BaseHTTPRequestHandler):
    """One connection; each method after `answer` is one route, and raises `HubError` for an error."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionCutError, ConnectionError):
            self.close_connection = True

    def do_GET(self) -> None:
        """All methods; the log line is what faults and counts match."""
        fault = self.hub.take_fault(f"{self.command} {unquote(self.path)}")
        size = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut == "upload":
            self.rfile.read(min(size, fault.after_bytes))
            self.cut()
        self.body = (
            self.read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(size)
        )
        self.cut_after = fault.after_bytes if fault is not None and fault.cut == "answer" else None
        try:
            if fault is not None and fault.status is not None:
                return self.answer({"error": "injected"}, fault.status, fault.headers)
            with self.hub.lock:
                handle = self.route()
            handle()
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            headers = {name: value for name, value in headers.items() if value}
            self.answer({"error": error.message}, error.status, headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def cut(self) -> None:
        """End the connection so that the client notices at once."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionCutError

    def route(self):
        self.check_token()
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        for method, pattern, name in ROUTES:
            if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, url.path)):
                parts = {part: unquote(value) for part, value in match.groupdict().items() if value is not None}
                if "repo_id" in parts:
                    self.repo = self.find_repo(
                        "dataset" if "types" in parts and parts["types"].startswith("dataset") else "model",
                        parts["repo_id"],
                    )
                if "revision" in parts and name != "ref":
                    self.at = self.repo.at(parts["revision"])
                    if self.at is None:
                        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {parts['revision']}")
                return lambda: getattr(self, "on_" + name)(**parts)
        raise HubError(404, message=f"No such route: {self.command} {url.path}")

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send bytes, or anything else as JSON."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_response(status)
        for name, text in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        if self.cut_after == 0:
            self.cut()  # not even the headers
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.cut_after])
        if self.cut_after is not None:
            self.cut()

    # who asks

    def check_token(self) -> None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent not in ("", OWNER, READER):
            raise HubError(401, message="Invalid credentials in Authorization header")
        self.token = sent

    def needs_owner(self) -> None:
        if not self.token:
            raise HubError(401, message="Invalid username or password.")
        if self.token != OWNER:
            raise HubError(403, message="You don't have the rights to write to this repository")

    def find_repo(self, repo_type: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and self.token != OWNER):
            # The Hub does not tell strangers what exists.
            raise HubError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    # repositories

    def on_create(self) -> None:
        self.needs_owner()
        asked = json.loads(self.body)
        repo_type = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"}
        if (repo_type, repo_id) in self.hub.repos:
            return self.answer(url | {"error": "You already created this repo"}, 409)
        self.hub.create(repo_type, repo_id, private=asked.get("visibility") == "private")
        self.answer(url)

    def on_delete(self) -> None:
        self.needs_owner()
        asked = json.loads(self.body)
        self.hub.repos.pop((asked.get("type") or "model", f"{asked.get('organization') or 'tester'}/{asked['name']}"))
        self.answer({})

    def on_whoami(self) -> None:
        if not self.token:
            raise HubError(401, message="Invalid username or password.")
        name = "tester" if self.token == OWNER else "reader"
        role = "write" if self.token == OWNER else "read"
        self.answer({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def on_info(self, types: str, repo_id: str, revision: str = "main") -> None:
        commit = self.repo.at(revision)
        siblings = [
            {"rfilename": path, "blobId": blob.oid, "size": len(blob.content)}
            for path, blob in sorted(commit.files.items())
        ]
        about = {"id": repo_id, "sha": commit.sha, "siblings": siblings, "lastModified": commit.date}
        gated = "manual" if self.repo.gated else False
        self.answer(
            about | {"private": self.repo.private, "gated": gated, "disabled": False, "tags": [], "downloads": 0}
        )

    def on_refs(self, types: str, repo_id: str) -> None:
        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = listed(self.repo.branches, "heads"), listed(self.repo.tags, "tags")
        self.answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def on_ref(self, types: str, repo_id: str, kind: str, revision: str) -> None:
        """`revision` is what a tag is put on, and the name of a branch."""
        self.needs_owner()
        refs = self.repo.tags if kind == "tag" else self.repo.branches
        if self.command == "DELETE":
            refs.pop(revision)
            return self.answer({})
        asked = json.loads(self.body or b"{}")
        name, at = (asked["tag"], revision) if kind == "tag" else (revision, asked.get("startingPoint", "main"))
        commit = self.repo.at(at)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {at}")
        if name in refs:
            raise HubError(409, message=f"{kind} {name} exists already")
        refs[name] = commit.sha
        self.answer({})

    def on_commits(self, types: str, repo_id: str, revision: str) -> None:
        commits = self.repo.history(self.at)
        self.answer([{"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": []} for c in commits])

    # files

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, blob in self.at.files.items():
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                    name = prefix + "/".join(parts[:depth])
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    found[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
                if recursive or len(parts) == 1:
                    found[path] = blob.info(path)
        return [found[path] for path in sorted(found)]

    def on_tree(self, types: str, repo_id: str, revision: str, path: str = "") -> None:
        entries = self.entries(path, self.query.get("recursive", "").lower() == "true")
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.tree_page_size
        headers = {}
        if stop < len(entries):
            recursive = self.query.get("recursive", "false")
            here = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.url}{here}?recursive={recursive}&cursor={stop}>; rel="next"'
        self.answer(entries[start:stop], headers=headers)

    def on_paths_info(self, types: str, repo_id: str, revision: str) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        by_path = {entry["path"]: entry for entry in self.entries("", recursive=True)}
        self.answer([by_path[path.rstrip("/")] for path in wanted if path.rstrip("/") in by_path])

    def on_resolve(self, repo_id: str, revision: str, path: str, types: str = "") -> None:
        if self.repo.gated and self.token != OWNER:
            raise HubError(403 if self.token else 401, "GatedRepo", f"Access to {repo_id} is restricted")
        blob = self.at.files.get(path)
        common = {"X-Repo-Commit": self.at.sha, "Accept-Ranges": "bytes"}
        if blob is None:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({"error": "Entry not found"}, 404, common | error)
        common["ETag"] = f'"{blob.etag}"'
        if blob.is_lfs:
            common |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.answer(blob.content, headers=common)
        size = len(blob.content)
        first, last = (int(text) if text else None for text in match.groups())
        start, stop = (size - (last or 0), size) if first is None else (first, size if last is None else last + 1)
        if start >= size:
            return self.answer({}, 416, {"Content-Range": f"bytes */{size}"})
        part = blob.content[start:stop]
        where = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}
        self.answer(part, 206, common | where)

    # commits

    def on_validate_yaml(self) -> None:
        """The rules by which the Hub is known to refuse cards."""
        match = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        if match is None:
            return self.answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            data = yaml.safe_load(match[1]) or {}
        except yaml.YAMLError as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        bases = data.get("base_model") or []
        errors = [
            f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            for base in ([bases] if isinstance(bases, str) else bases)
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
        ]
        if data.get("license", "unknown") not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}')
        self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def on_preupload(self, types: str, repo_id: str, revision: str) -> None:
        self.needs_owner()
        files = []
        for asked in json.loads(self.body)["files"]:
            blob = self.at.files.get(asked["path"])
            mode = "lfs" if self.hub.is_large(asked["path"], asked["size"]) else "regular"
            known = {} if blob is None else {"oid": blob.etag}
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        self.answer({"files": files})

    def on_lfs_batch(self, repo_id: str, types: str = "") -> None:
        self.needs_owner()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
            is_held = asked["oid"] in self.hub.large_files
            objects.append(asked if is_held else asked | {"actions": {"upload": upload}})
        self.answer({"transfer": "basic", "objects": objects})

    def on_lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, message="The content does not match its sha256")
        self.hub.large_files[oid] = self.body
        self.answer({})

    def on_commit(self, types: str, repo_id: str, revision: str) -> None:
        self.needs_owner()
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self.at.sha):
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(self.at.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, message=f"LFS pointer {value['path']} points to a file that does not exist")
                files[value["path"]] = Blob(self.hub.large_files[value["oid"]], is_lfs=True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        with self.hub.lock:
            commit = self.repo.commit(revision, header["summary"], files)
        prefix = "datasets/" if self.repo.repo_type == "dataset" else ""
        url = f"{self.hub.url}/{prefix}{quote(repo_id)}/commit/{commit.sha}"
        self.answer({"success": True, "commitUrl": url, "commitOid": commit.sha, "hookOutput": ""})
