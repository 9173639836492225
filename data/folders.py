"""Where the files of a source lie: a local folder, or a dataset repository on the Hub that is never listed.

Tables come through the Hub client's cache. Volumes do not: tens of thousands of them would fill the disk, so each is
held in memory while it is read. Both are retried after network faults, a limited number of times.
"""

import contextlib
import posixpath
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from medct.byte_sources_medct import ByteSource, is_address, leads_below, of_bytes
from medct.common.retry import keep_trying
from medct.data.sources import DataError, Deferred
from medct.volume_medct import VolumeError

MAX_RETRIES = 5
"""After a network fault or a 5xx or 429 response, with waits that grow from 1 second."""
MAX_WAIT_S = 8
HUB_ADDRESS = "hf://datasets/"


@dataclass(frozen=True)
class LocalFolder:
    """Files in a local folder."""

    root: Path
    is_local = True

    def __str__(self) -> str:
        return str(self.root)

    @property
    def address(self) -> str:
        """The folder's address, for code that opens its files itself."""
        return str(self.root)

    def file(self, path: str) -> Path | None:
        """A table by its path in the folder; `None` if there is none."""
        return self.root / path if (self.root / path).is_file() else None

    def volume(self, path: str) -> str:
        """A volume by its path in the folder, as `read_volume` takes it."""
        return str(self.root / path)

    def find_volume(self, path: str) -> str | None:
        """The path of a volume with its accents composed as they are here; `None` if there is none."""
        forms = (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))
        return next((form for form in forms if (self.root / form).exists()), None)


@dataclass(frozen=True)
class HubFile(Deferred):
    """A file in a dataset repository, fetched when it is opened and not kept."""

    repo_id: str
    path: str
    revision: str | None
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{HUB_ADDRESS}{self.repo_id}/{self.path}"

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Yield `bytes` and `path`, as an undecoded `datasets.Nifti()` column does, and what finds files `beside` it.

        Raises:
            VolumeError: If the file does not exist, or this user has no access to it.
            OSError, httpx2.HTTPError: If it cannot be fetched.
        """
        yield {"bytes": self._fetch(), "path": self.path, "beside": self._beside}

    def _beside(self, names: Collection[str]) -> ByteSource | None:
        """The file of voxels that a header names: asked for by name, as the repository is not listed."""
        for name in filter(leads_below, sorted(names)):
            other = replace(self, path=posixpath.join(posixpath.dirname(self.path), name))
            with contextlib.suppress(VolumeError):  # that there is no such file
                return of_bytes(other._fetch(), name)
        return None

    def _fetch(self) -> bytes:
        url = hf_hub_url(self.repo_id, self.path, repo_type="dataset", revision=self.revision)
        headers = build_hf_headers(token=self.token)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            response = http_backoff(
                "GET", url, headers=headers, timeout=timeout_s, max_retries=MAX_RETRIES, max_wait_time=MAX_WAIT_S
            )
            hf_raise_for_status(response)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            reason = f"it does not exist, or you have no access to it ({type(error).__name__})"
            raise VolumeError(str(self), reason, "Check the table that names it, and your token") from error
        return response.content


@dataclass(frozen=True)
class HubFolder:
    """Files in a dataset repository at one commit, by names known beforehand."""

    repo_id: str
    path: str
    revision: str | None
    token: str | None = field(default=None, repr=False)
    is_local = False

    @classmethod
    def open(cls, address: str, revision: str | None = None, token: str | None = None) -> "HubFolder":
        """Open a repository, or a folder in it, at the commit that a revision now means: a run never mixes two.

        Args:
            address: `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`.
            revision: Branch, tag or commit, unless the address has one.
            token: Token for the Hub, in place of that of the logged-in user.

        Raises:
            DataError: If the address is not of this form, or the repository cannot be reached.
        """
        try:
            uri = parse_hf_uri(address)
        except HfUriError as error:
            raise DataError(f"{address}: not the address of a dataset. Write {HUB_ADDRESS}ORG/NAME.") from error
        revision = uri.revision or revision
        # Every repository has this file.
        url = hf_hub_url(uri.id, ".gitattributes", repo_type="dataset", revision=revision)
        with _explained(address), contextlib.suppress(RemoteEntryNotFoundError):
            revision = get_hf_file_metadata(url, token=token, retry_on_errors=True).commit_hash or revision
        return cls(uri.id, uri.path_in_repo.strip("/"), revision, token)

    def __str__(self) -> str:
        return f"{HUB_ADDRESS}{self.repo_id}" + (f"/{self.path}" if self.path else "")

    @property
    def address(self) -> str:
        """The folder's address with its commit, for code that opens its files itself."""
        pin = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{HUB_ADDRESS}{self.repo_id}{pin}" + (f"/{self.path}" if self.path else "")

    def _in_repo(self, path: str) -> str:
        return f"{self.path}/{path}" if self.path else path

    def file(self, path: str) -> Path | None:
        """A table by its path in the folder, from the cache if possible; `None` if there is none.

        Raises:
            DataError: If it cannot be fetched.
        """
        with _explained(str(self)):
            try:
                return Path(self._download(self._in_repo(path)))
            except RemoteEntryNotFoundError:
                return None

    def _download(self, name: str) -> str:
        """A file in the Hub client's cache. The client retries all faults but a 5xx response at the file's start."""

        def download() -> str:
            return hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, token=self.token)

        def passes(error: Exception) -> float | None:
            return 0 if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500 else None

        return keep_trying(download, passes, [min(2**retry, MAX_WAIT_S) for retry in range(MAX_RETRIES)])

    def volume(self, path: str) -> HubFile:
        """A volume by its path in the folder, as `read_study` takes it."""
        return HubFile(self.repo_id, self._in_repo(path), self.revision, self.token)

    def find_volume(self, path: str) -> str:
        """The path as it is: asking would cost one request per volume. A missing volume is a bad sample."""
        return path


Folder = LocalFolder | HubFolder


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn the Hub client's errors into one sentence with a remedy."""
    try:
        yield
    except GatedRepoError as error:
        page = address.replace("hf://", f"{constants.ENDPOINT}/", 1)
        raise DataError(
            f"{address}: access is gated. Accept its terms at {page}, then log in with `hf auth login` or pass a token."
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(f"{address}: has no such revision. Check it, or leave it out.") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{address}: no such dataset, or it is private. Check the name, or log in with `hf auth login`."
        ) from error
    except Exception as error:  # network faults come as OSError, httpx2's and others
        raise DataError(
            f"{address}: cannot be reached ({type(error).__name__}). Check the network, or pass a local copy."
        ) from error


def refuse_revision(address: str, revision: str | None) -> None:
    """Refuse a commit of what has none: it may have been meant for another repository, such as the model's.

    Args:
        address: Of a source.
        revision: Branch, tag or commit, if one is asked for.

    Raises:
        DataError: If the source is not a repository.
    """
    if revision is not None and not address.startswith(HUB_ADDRESS):
        raise DataError(f"{address}: it is no data set on the Hub, so it has no commit {revision!r}. Leave that out.")


def open_folder(address: str, revision: str | None = None, token: str | None = None) -> Folder:
    """Open a local folder or a dataset repository.

    Args:
        address: Folder, or `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`.
        revision: Branch, tag or commit of a repository, unless the address has one.
        token: Token for the Hub, in place of that of the logged-in user.

    Raises:
        DataError: If the address leads to neither.
    """
    if address.startswith(HUB_ADDRESS):
        return HubFolder.open(address, revision, token)
    if is_address(address):
        raise DataError(f"{address}: only local folders and {HUB_ADDRESS}ORG/NAME can be streamed. Pass one of them.")
    if not Path(address).is_dir():
        raise DataError(f"{address}: no such folder. Pass a folder, or {HUB_ADDRESS}ORG/NAME.")
    return LocalFolder(Path(address))
