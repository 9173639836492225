"""Put an adapter or a converted base model on the Hub, each in one commit.

    medct push runs/site-b ORG/NAME            # an adapter folder, as training leaves it
    medct push ct-clip ORG/NAME --private      # a folder that `medct convert` made

What is pushed is checked first: no pickles, no paths of this machine, only files that belong there. The folder itself
is never changed, so a push that failed can be run again.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import PIL.Image
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from medct.adapters_medct import CONFIG_FILE, DESCRIPTION_FILE, WEIGHTS_FILE, adapter_fingerprint
from medct.common.drawings import said_on_card
from medct.common.files import file_sha256
from medct.common.output import as_word
from medct.common.paths import find_paths, without_paths
from medct.common.retry import keep_trying
from medct.common.run_files import RESULTS, TRAIN_CONFIG
from medct.errors_medct import MedCTError
from medct.publishing.cards import (
    GENERATED,
    PICTURES,
    PLACEHOLDER_REPO,
    base_license,
    is_hub_id,
    local_paths_of,
    read_json,
    recorded_base,
    render_card,
)

PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
# A run's record of itself; it names the folders that it read and wrote.
RUN_FILES = (RESULTS, TRAIN_CONFIG)
# Anything else in a folder, such as lists of studies and pictures of patients, is not pushed.
ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, DESCRIPTION_FILE, "README.md", *RUN_FILES, *PICTURES)
MODEL_FILES = ("*.safetensors", "*.json", "*.py", "*.txt", "*.jinja", "README.md", "LICENSE", *PICTURES)
SHARD_FILES = ("README.md", "manifest.json", "data/*.parquet")
TEXT_SUFFIXES = {".jinja", ".json", ".md", ".py", ".txt"}
# Part of the blank form that PEFT saves as README.md.
PEFT_FORM = "[More Information Needed]"

WAITS_S = (1, 2, 4)
"""Seconds before each retry."""
LONGEST_WAIT_S = 300
PASSING_STATUS = {408, 429, 500, 502, 503, 504}

Answer = TypeVar("Answer")
Files = dict[str, Path | bytes]


class PushError(MedCTError, RuntimeError):
    """A push that was refused or failed; the message says why and what to do."""


def commit_of(model: str, revision: str | None = None) -> str | None:
    """The commit that a model's revision points to; `None` for a folder.

    Args:
        model: Hub id or folder.
        revision: Commit, tag or branch; the default branch by default.
    """
    return HfApi().resolve_revision(model, revision=revision).resolved if is_hub_id(model) else None


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    base: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
) -> str:
    """Put an adapter on the Hub.

    Args:
        folder: As `train.py` leaves it, or `PeftModel.save_pretrained`. It is not changed.
        repo_id: "ORG/NAME"; made if it does not exist.
        private: Whether to hide it from others.
        base: Hub id of the base, if the adapter was trained on a folder.
        base_revision: Commit, tag or branch of the base; the adapter will name the commit.
        license: Identifier of the licence, if the base's card has none.

    Returns:
        Address of the commit.

    Raises:
        PushError: If the folder is not fit to be published, or the push failed.
    """
    folder = Path(folder)
    options = {"--base": base, "--base_revision": base_revision, "--license": license}
    job = _Job(folder, repo_id, private, options)
    _refuse_pickles(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise PushError(f"{folder} has no {CONFIG_FILE} or no {WEIGHTS_FILE}. Pass the folder of a saved adapter.")
    _refuse_other_weights(folder)
    model, commit = job.try_hard(lambda: _published_base(job.api, folder, base, base_revision))
    files = _adapter_files(folder, repo_id, model, commit, _license_of(folder, model, commit, license))
    return job.push(files, "Add adapter")


def push_model(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Put a converted model on the Hub, with its processor and code.

    Args:
        folder: As `medct convert` leaves it. It is not changed.
        repo_id: "ORG/NAME"; made if it does not exist.
        private: Whether to hide it from others.

    Returns:
        Address of the commit.

    Raises:
        PushError: If the folder is not fit to be published, or the push failed.
    """
    folder = Path(folder)
    _refuse_pickles(folder)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise PushError(f"{folder} has no config.json or no safetensors. Pass the folder of a converted model.")
    code = {f"{name.split('.')[0]}.py" for name in read_json(folder, "config.json").get("auto_map", {}).values()}
    missing = sorted(name for name in code if not (folder / name).is_file())
    if missing or not code:
        lacking = ", ".join(missing) or "no auto_map"
        raise PushError(f"{folder} lacks its code ({lacking}), so no one could load it. Convert it again.")
    files: Files = {path.name: path for path in _chosen(folder, MODEL_FILES)}
    for name in set(RUN_FILES) & files.keys():
        files[name] = _json_bytes(folder, read_json(folder, name))
    card = folder / "README.md"
    if not card.is_file():
        raise PushError(f"{folder} has no README.md. Write one that says what the model is, and under which licence.")
    files[card.name] = card.read_text(encoding="utf-8").replace(PLACEHOLDER_REPO, repo_id).encode()
    return _Job(folder, repo_id, private, {}).push(files, "Add model")


def push_shards(folder: Path, repo_id: str) -> str:
    """Upload a finished folder to a private Hub dataset, resuming where an earlier upload stopped.

    Args:
        folder: As `medct prepare` leaves it.
        repo_id: "ORG/NAME"; made if it does not exist.

    Returns:
        Address of the dataset.

    Raises:
        PushError: If the dataset is public, a table names a path of this machine, or the Hub refuses.
    """
    api = HfApi()
    _refuse_paths(folder, {path.name: path for path in _chosen(folder, ("README.md", "manifest.json"))})

    def upload() -> None:
        api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
        if not api.repo_info(repo_id, repo_type="dataset").private:
            raise PushError(
                f"{repo_id} is public, but patients' scans must not be. Make it private, or choose another name."
            )
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=list(SHARD_FILES),
            commit_message="Prepared shards",
        )

    _try_hard(upload, repo_id, f"{folder} is intact; the same command sends the rest.")
    return f"hf://datasets/{repo_id}"


def _refuse_other_weights(folder: Path) -> None:
    """Refuse to publish operating points or figures beside weights that they are not of."""
    description, results = (read_json(folder, name) for name in (DESCRIPTION_FILE, RESULTS))
    measured = ((results.get("provenance") or {}).get("models") or {}).values()
    found = adapter_fingerprint(folder)
    for name, known in ((DESCRIPTION_FILE, [description]), (RESULTS, measured)):
        if {each.get("adapter_fingerprint") for each in known} - {None, found}:
            raise PushError(
                f"{folder}: {name} is of other weights than {WEIGHTS_FILE}, which was saved again since. Push the "
                f"folder that the run left, or take {name} out of it."
            )


def _published_base(api: HfApi, folder: Path, base: str | None, revision: str | None) -> tuple[str, str]:
    """Id and commit of an adapter's base on the Hub."""
    recorded, recorded_revision = recorded_base(folder)
    if base is None and not is_hub_id(recorded):
        name = Path(recorded or "unknown").name
        raise PushError(
            f"{folder} was trained on a folder of this machine ({name}), which no one else can load: push that first "
            f"(medct push {name} ORG/BASE), then pass --base ORG/BASE --base_revision COMMIT."
        )
    if base is None:
        base, revision = str(recorded), recorded_revision
    if revision is None:
        raise PushError(f"The commit of {base} that {folder} was trained on is unknown. Pass --base_revision COMMIT.")
    try:
        commit = str(api.model_info(base, revision=revision).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise PushError(f"The base {base} is not on the Hub at revision {revision}, or you lack access.") from error
    weights = Path(recorded or "", "model.safetensors")
    if not is_hub_id(recorded) and weights.is_file():
        found = api.get_paths_info(base, [weights.name], revision=commit)
        theirs = [getattr(file.lfs, "sha256", None) for file in found if isinstance(file, RepoFile)]
        if theirs != [file_sha256(weights)]:
            raise PushError(f"The weights of {base} are not those of {weights.parent.name}, the base of {folder}.")
    return base, commit


def _license_of(folder: Path, base: str, commit: str, license: str | None) -> str:
    on_card = said_on_card(base, "license", revision=commit)
    if license and on_card and license.lower() != str(on_card).lower():
        raise PushError(f"{base} is licensed {on_card}, and an adapter takes its base's licence. Leave out --license.")
    license = on_card or license or base_license(base, commit) or read_json(folder, RESULTS).get("license")
    if license is None:
        raise PushError(
            f"The card of {base} names no licence, and an adapter takes its base's. Pass --license IDENTIFIER."
        )
    return license


def _adapter_files(folder: Path, repo_id: str, base: str, commit: str, license: str) -> Files:
    """What an adapter's repository will hold: the folder's files, with the base under its name on the Hub."""
    files: Files = {path.name: path for path in _chosen(folder, ADAPTER_FILES)}
    known: dict[str, dict[str, Any]] = {
        CONFIG_FILE: {"base_model_name_or_path": base, "revision": commit},
        TRAIN_CONFIG: {"model": base, "revision": commit, "output_dir": None},
    }
    for name in (CONFIG_FILE, DESCRIPTION_FILE, *RUN_FILES):
        content = read_json(folder, name)
        if not content:
            continue
        content |= {key: value for key, value in known.get(name, {}).items() if key in content or name == CONFIG_FILE}
        if isinstance(content.get("base"), dict) and "model" in content["base"]:
            content["base"] |= {"model": base, "revision": commit}
        decided = content.get("provenance") or {}
        for each in (decided.get("settings"), *(decided.get("models") or {}).values()):
            if each:
                each |= {"model": base, "revision": commit}
        files[name] = _json_bytes(folder, content)
    card = folder / "README.md"
    if not card.is_file() or any(mark in card.read_text(encoding="utf-8") for mark in (GENERATED, PEFT_FORM)):
        text = render_card(folder, repo_id=repo_id, base=base, revision=commit, license=license)
        files["README.md"] = text.encode()
    return files


def _json_bytes(folder: Path, content: dict[str, Any]) -> bytes:
    return (json.dumps(without_paths(content, local_paths_of(folder)), indent=2) + "\n").encode()


class _Job:
    """One push: as whom, from where, to where; and how to retry it."""

    def __init__(self, folder: Path, repo_id: str, private: bool, options: dict[str, str | None]):
        self.folder, self.repo_id, self.private = folder, repo_id, private
        self.api = HfApi()
        flags = [f"{flag} {as_word(value)}" for flag, value in options.items() if value is not None]
        words = ["medct push", as_word(folder), repo_id, *(["--private"] if private else []), *flags]
        self.command = " ".join(words)

    def push(self, files: Files, message: str) -> str:
        """Push files in a single commit, in the place of what an earlier push of an adapter left.

        Else its operating points would pass for those of the new weights.

        Args:
            files: Content, or a file that holds it, by name in the repository.
            message: The commit's message.

        Returns:
            Address of the commit.
        """
        _refuse_paths(self.folder, files)

        def commit() -> str:
            self.api.create_repo(self.repo_id, private=self.private or None, exist_ok=True)
            if self.private and not self.api.model_info(self.repo_id).private:
                raise PushError(f"{self.repo_id} is already public. Make it private on its page, or choose another.")
            old = {*ADAPTER_FILES}.intersection(self.api.list_repo_files(self.repo_id)) - files.keys()
            # Operations remember what was sent, so each attempt needs its own.
            operations: list[CommitOperationAdd | CommitOperationDelete] = []
            operations += [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
            operations += map(CommitOperationDelete, sorted(old))
            # What an earlier attempt uploaded is found and not sent again, so there is still just one commit.
            return self.api.create_commit(self.repo_id, operations, commit_message=message).commit_url

        return self.try_hard(commit)

    def try_hard(self, act: Callable[[], Answer]) -> Answer:
        """As `_try_hard`; the error names the command that finishes the push."""
        return _try_hard(act, self.repo_id, f"{self.folder} is intact; finish with: {self.command}")


def _try_hard(act: Callable[[], Answer], repo_id: str, remedy: str) -> Answer:
    """Call a function, and retry when the Hub or the network fails temporarily.

    Raises:
        PushError: If it cannot be done, or the attempts are used up.
    """

    def tell(error: Exception, wait_s: float) -> None:
        print(f"{_reason(error)}; retrying in {wait_s:g} s", file=sys.stderr)

    try:
        return keep_trying(act, _passing, WAITS_S, tell)
    except PushError:
        raise
    # LFS uploads wrap their errors in RuntimeError; the client raises ValueError for a bad card or name.
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        # With a bad card or name, the same command would fail again.
        remedy = "" if _is_worded(error) else f" {remedy}"
        raise PushError(f"Pushing to {repo_id} failed: {_reason(error)}.{remedy}") from error


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _response(error: BaseException) -> httpx2.Response | None:
    return next((link.response for link in _chain(error) if isinstance(link, HfHubHTTPError)), None)


def _passing(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait, 0 if it does not say; `None` if a retry cannot help."""
    if isinstance(error, PushError):
        return None
    response = _response(error)
    if response is not None:
        if response.status_code not in PASSING_STATUS:
            return None
        limit = parse_ratelimit_headers(response.headers)
        asked = limit.reset_in_seconds if limit is not None and limit.remaining == 0 else 0
        retry_after = response.headers.get("Retry-After", "")
        asked = max(asked, int(retry_after) if retry_after.isdigit() else 0)
        return asked if asked <= LONGEST_WAIT_S else None
    chain = _chain(error)
    if any(isinstance(link, OfflineModeIsEnabled | LocalTokenNotFoundError) for link in chain):
        return None
    return 0 if any(isinstance(link, httpx2.TransportError | ConnectionError) for link in chain) else None


def _is_worded(error: Exception) -> bool:
    """Whether the message is the client's own sentence about a bad card or name."""
    return isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError)


def _reason(error: Exception) -> str:
    """Why a request failed, in a few words."""
    response = None if _is_worded(error) else _response(error)
    status = None if response is None else response.status_code
    if status == 401:
        return "you are not logged in to the Hub (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "you may not write there (403): choose another name, or a token with write access"
    if status is not None:
        words = {404: "there is no such repository", 429: "too many requests"}.get(status, "the Hub refused")
        return f"{words} ({status})"
    last = error if _is_worded(error) else _chain(error)[-1]
    words = " ".join(str(last).split()) or type(last).__name__
    return words.rstrip(".:")


def _chosen(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir():
        raise PushError(f"{folder}: no such folder. Pass the folder of an adapter or of a converted model.")
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in PICKLES)
    if found:
        raise PushError(
            f"{folder} holds {found[0]} (pickles found: {len(found)}). Pickles can hold code, so only safetensors are "
            "pushed. Remove them."
        )


def _refuse_paths(folder: Path, files: Files) -> None:
    known = local_paths_of(folder)
    for name, content in files.items():
        for text in _texts_in(name, content):
            if found := find_paths(text, known):
                raise PushError(f"{folder}/{name} names a path of this machine ({found[0]}). Remove it, then push.")


def _texts_in(name: str, content: Path | bytes) -> list[str]:
    """What can be read in a file: all of a text, and what is written into a picture beside its pixels."""
    suffix = Path(name).suffix
    if suffix == ".png" and isinstance(content, Path):
        with contextlib.suppress(PIL.UnidentifiedImageError), PIL.Image.open(content) as image:
            return [str(value) for value in image.info.values()]
    if suffix in TEXT_SUFFIXES or name == "LICENSE":
        return [content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")]
    return []


def left_out(folder: Path) -> list[str]:
    """Files of a folder that are not pushed."""
    pushed = _chosen(folder, ADAPTER_FILES if (folder / CONFIG_FILE).is_file() else MODEL_FILES)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path not in pushed)
