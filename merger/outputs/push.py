"""Uploads a finished merge to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from merger.checkpoint.formats import SUFFIXES
from merger.checkpoint.hub import connection_errors, is_repository, quiet_when_piped
from merger.errors import RecipeError, ResourceError, VerifyError, system_reason
from merger.options import RunOptions, check_options, path_argument
from merger.outputs.verify import whole_merge

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_INDEX = ".index.json"
_MESSAGE = "A merge, with its manifest in merger.json"


@dataclass(frozen=True)
class Pushed:
    """The result of `push`."""

    repository: str
    commit: str
    private: bool
    unchanged: bool  # the repository held the same files before
    shards: int

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def push(
    directory: str | Path,
    repository: str,
    options: RunOptions = RunOptions(),
    *,
    public: bool = False,
    quiet: bool = False,
) -> Pushed:
    """Uploads a finished merge with its card and manifest; a second push resumes an interrupted one.

    A missing repository is created, private unless ``public``. After the upload the files on the Hub are compared
    with the manifest. ``quiet`` hides the Hub's progress bar. Raises CheckpointError or VerifyError for a folder that
    is no complete merge, RecipeError if the Hub refuses the upload, and ResourceError if it cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    check_options(options)
    folder = path_argument("directory", directory)
    manifest = whole_merge(folder)
    if "/" not in repository or "@" in repository or not is_repository(repository):
        raise RecipeError(f"{repository}: is no name of a repository; give it as org/name")
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{repository}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it")
    if options.offline:
        raise RecipeError(f"{repository}: nothing is uploaded offline; push without the option offline")
    api = HfApi()
    with _translated_errors(repository), _without_log(), quiet_when_piped(always=quiet):
        info = _ensure_repository(api, repository, public=public)
        _refuse_foreign_weights(info, folder)
        _upload(api, folder, repository)
        pushed_info = _model_info(api, repository)
    _check_shards(pushed_info, manifest.shards)
    return Pushed(
        repository, pushed_info.sha or "", bool(pushed_info.private), pushed_info.sha == info.sha, len(manifest.shards)
    )


def _model_info(api: HfApi, repository: str) -> ModelInfo:
    return api.model_info(repository, files_metadata=True)


def _ensure_repository(api: HfApi, repository: str, *, public: bool) -> ModelInfo:
    """Returns the repository before the upload and creates it if missing; refuses a public one unless ``public``."""
    from huggingface_hub import errors as hub

    try:
        info = _model_info(api, repository)
    except hub.GatedRepoError:
        raise
    except hub.RepositoryNotFoundError:
        api.create_repo(repository, private=not public, exist_ok=True)
        info = _model_info(api, repository)
    if not info.private and not public:
        raise RecipeError(f"{repository}: everyone can see it; say public=True if that is meant, or name another one")
    return info


def _refuse_foreign_weights(info: ModelInfo, folder: Path) -> None:
    """Raises RecipeError if the repository holds weight files of another model, which loaders would mix in."""
    remote_files = {file.rfilename for file in info.siblings or () if "/" not in file.rfilename}
    local_files = {path.name for path in folder.iterdir()}
    strangers = sorted(name for name in remote_files - local_files if name.endswith((*SUFFIXES, _INDEX)))
    if strangers:
        remainder = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise RecipeError(
            f"{info.id}: holds {', '.join(strangers[:3])}{remainder}, which this model has not, and which would be "
            "taken for a part of it; delete them there, or push to another repository"
        )


def _upload(api: HfApi, folder: Path, repository: str) -> None:
    """Uploads every file of the folder that the repository does not hold yet.

    upload_folder streams a large one in several commits, which upload_large_folder was for in older versions. That one
    is not used there: whatever the Hub answers, it tries for ever, and it keeps its notes in the model's folder.
    """
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message=_MESSAGE)


def _check_shards(info: ModelInfo, shards: Mapping[str, str]) -> None:
    """Raises VerifyError if shards on the Hub differ from those in the manifest."""
    remote_files = {file.rfilename: file.lfs for file in info.siblings or ()}
    faults = [f"{info.id}: {file}: did not arrive" for file in shards if file not in remote_files]
    for file, sha256 in shards.items():
        stored = remote_files.get(file)
        if stored is not None and stored.sha256 != sha256:
            faults.append(f"{info.id}: {file}: its SHA-256 is {stored.sha256}, but {sha256} in merger.json")
    if faults:
        raise VerifyError("\n".join(faults))


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def _without_log() -> Iterator[None]:
    """Silences huggingface_hub's log: its remarks on retries hold URLs, which may hold credentials."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _translated_errors(repository: str) -> Iterator[None]:
    """Translates huggingface_hub's exceptions into one line without URLs, which may hold credentials."""
    # ValueError: an answer that it does not understand
    expected: tuple[type[BaseException], ...] = (*connection_errors(), ValueError)
    try:
        yield
    except expected as error:
        _raise_translated(error, repository)


def _raise_translated(error: BaseException, repository: str) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    host = urlsplit(constants.ENDPOINT).hostname
    while not isinstance(error, hub.HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # uploads side by side wrap what went wrong
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    if isinstance(error, hub.GatedRepoError):
        reason = "is gated; ask for access on its page, then `hf auth login`"
    elif status == 401:
        reason = f"{host} does not know you; `hf auth login`, or set HF_TOKEN to a token that may write"
    elif status == 403:
        reason = "your token may not write there; take one that may, or another name"
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = f"is not on {host}, or not for you; mend the name, or `hf auth login`"
    elif 400 <= status < 500 and status not in (408, 429):
        reason = f"{host} refuses it ({status}{_reason(error)})"
    elif isinstance(error, FileNotFoundError | PermissionError) and error.filename:
        raise ResourceError(f"{error.filename}: cannot be read: {system_reason(error)}") from None
    else:
        cause = str(status) if status else type(error).__name__
        raise ResourceError(
            f"{repository}: {host} could not be reached, or broke off ({cause}); "
            "push again, and it goes on with what is missing"
        ) from None
    raise RecipeError(f"{repository}: {reason}") from None


def _reason(error: BaseException) -> str:
    """Returns the Hub's message in one line, or nothing if the message holds the token."""
    from huggingface_hub import get_token

    words = " ".join(str(getattr(error, "server_message", None) or "").split())[:300]
    token = get_token()
    return f": {words}" if words and not (token and token in words) else ""
