"""What the loopback Hub holds: repositories, their commits and files."""

import dataclasses
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any


@dataclasses.dataclass(frozen=True)
class Blob:
    """The content of a file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds of an LFS file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def oid(self) -> str:
        held = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def info(self, path: str) -> dict[str, Any]:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        return info | ({"lfs": lfs} if self.is_lfs else {})


@dataclasses.dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]
    date: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


class Repo:
    """A repository: commits, branches and tags."""

    def __init__(self, repo_type: str, repo_id: str, private: bool):
        self.repo_type = repo_type
        self.repo_id = repo_id
        self.private = private
        self.gated = False
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        names = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{parent} {len(self.commits)} {title}\n{names}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")
