"""Where the files of a source lie: a local folder, or a dataset repository of the Hub that is never listed.

Tables come through the Hub client's cache. Volumes do not: tens of thousands of them would fill the disk, so each is
held in memory while it is read. Both are tried again after network faults, and then given up.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
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

from medct.byte_sources_medct import is_address
from medct.common.retry import keep_trying
from medct.data.sources import DataError, Deferred
from medct.volume_io_medct import VolumeError

MAX_RETRIES = 5
"""After a network fault or an answer 5xx or 429, with waits that grow from 1 second."""
MAX_WAIT_S = 8
HUB_ADDRESS = "hf://datasets/"


@dataclass(frozen=True)
class LocalFolder:
    """Files of a local folder."""

    root: Path
    is_local = True

    def __str__(self) -> str:
        return str(self.root)

    @property
    def address(self) -> str:
        """For those who open its files themselves."""
        return str(self.root)

    def file(self, path: str) -> Path | None:
        """A table by its path in the folder; `None` if there is none."""
        return self.root / path if (self.root / path).is_file() else None

    def volume(self, path: str) -> str:
        """What `read_volume` takes."""
        return str(self.root / path)

    def has_volume(self, path: str) -> bool:
        return (self.root / path).exists()


@dataclass(frozen=True)
class HubFile(Deferred):
    """A file of a dataset repository, fetched when it is opened and then forgotten."""

    repo_id: str
    path: str
    revision: str | None
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{HUB_ADDRESS}{self.repo_id}/{self.path}"

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, Any]]:
        """Gives its bytes and its path, as an undecoded `datasets.Nifti()` column does.

        Raises:
            VolumeError: If there is no such file, or not for this user.
            OSError, httpx2.HTTPError: If it cannot be fetched.
        """
        url = hf_hub_url(self.repo_id, self.path, repo_type="dataset", revision=self.revision)
        headers = build_hf_headers(token=self.token)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            response = http_backoff(
                "GET", url, headers=headers, timeout=timeout_s, max_retries=MAX_RETRIES, max_wait_time=MAX_WAIT_S
            )
            hf_raise_for_status(response)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            reason = f"it is not there, or not for you ({type(error).__name__})"
            raise VolumeError(str(self), reason, "Check the table that names it, and your token") from error
        yield {"bytes": response.content, "path": self.path}


@dataclass(frozen=True)
class HubFolder:
    """Files of a dataset repository at one commit, by names that are known."""

    repo_id: str
    path: str
    revision: str | None
    token: str | None = field(default=None, repr=False)
    is_local = False

    @classmethod
    def open(cls, address: str, revision: str | None = None, token: str | None = None) -> "HubFolder":
        """A repository, or a folder in it, at the commit that a revision means now: a run never mixes two.

        Args:
            address: `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`.
            revision: Branch, tag or commit, unless the address has one.
            token: Instead of the one that is logged in.

        Raises:
            DataError: If it is no such address, or the repository cannot be reached.
        """
        try:
            uri = parse_hf_uri(address)
        except HfUriError as error:
            raise DataError(f"{address}: no address of a dataset. Write {HUB_ADDRESS}ORG/NAME.") from error
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
        """With its commit, for those who open its files themselves."""
        pin = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{HUB_ADDRESS}{self.repo_id}{pin}" + (f"/{self.path}" if self.path else "")

    def _in_repo(self, path: str) -> str:
        return f"{self.path}/{path}" if self.path else path

    def file(self, path: str) -> Path | None:
        """A table by its path in the folder, from the cache if it is there; `None` if there is none.

        Raises:
            DataError: If it cannot be fetched.
        """
        with _explained(str(self)):
            try:
                return Path(self._download(self._in_repo(path)))
            except RemoteEntryNotFoundError:
                return None

    def _download(self, name: str) -> str:
        """A file in the Hub client's cache. The client overcomes all faults but an answer 5xx where the file begins."""

        def download() -> str:
            return hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, token=self.token)

        def passes(error: Exception) -> float | None:
            return 0 if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500 else None

        return keep_trying(download, passes, [min(2**retry, MAX_WAIT_S) for retry in range(MAX_RETRIES)])

    def volume(self, path: str) -> HubFile:
        """What `read_study` takes."""
        return HubFile(self.repo_id, self._in_repo(path), self.revision, self.token)

    def has_volume(self, path: str) -> bool:
        """Not asked: it would be a request a volume. One that is missing is a bad sample."""
        return True


Folder = LocalFolder | HubFolder


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Errors of the Hub client in a sentence, with what to do."""
    try:
        yield
    except RemoteEntryNotFoundError:
        raise
    except GatedRepoError as error:
        page = address.replace("hf://", f"{constants.ENDPOINT}/", 1)
        raise DataError(
            f"{address}: gated. Accept its terms at {page}, then log in with `hf auth login` or pass a token."
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


def open_folder(address: str, revision: str | None = None, token: str | None = None) -> Folder:
    """A local folder or a dataset repository.

    Raises:
        DataError: If there is none at the address.
    """
    if str(address).startswith(HUB_ADDRESS):
        return HubFolder.open(str(address), revision, token)
    if is_address(str(address)):
        raise DataError(f"{address}: only local folders and {HUB_ADDRESS}ORG/NAME are streamed. Pass one of them.")
    if not Path(address).is_dir():
        raise DataError(f"{address}: no such folder. Pass a folder, or {HUB_ADDRESS}ORG/NAME.")
    return LocalFolder(Path(address))
