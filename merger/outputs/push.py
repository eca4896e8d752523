"""A finished merge on its way to a repository of the Hub, by huggingface_hub's own upload of large folders."""

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
from merger.options import RunOptions
from merger.outputs.verify import whole_merge

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_INDEX = ".index.json"
_MESSAGE = "A merge, with its manifest in merger.json"


@dataclass(frozen=True)
class Pushed:
    """Where a model is now."""

    repository: str
    commit: str
    private: bool
    unchanged: bool  # it was there already, file by file
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
    """Uploads a finished merge with its card and manifest; a push that broke off goes on when it is run again.

    The repository is made if it is not there, private unless ``public``. What the Hub holds in the end is
    compared with the manifest. ``quiet`` draws no progress bar of the Hub. Raises CheckpointError or VerifyError for a
    folder that is no whole merge, RecipeError for what the Hub refuses, and ResourceError where it cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    folder = Path(directory)
    manifest = whole_merge(folder)
    if "/" not in repository or "@" in repository or not is_repository(repository):
        raise RecipeError(f"{repository}: is no name of a repository; give it as org/name")
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{repository}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it")
    if options.offline:
        raise RecipeError(f"{repository}: nothing is uploaded offline; push without the option offline")
    api = HfApi()
    with _explained(repository), _without_log(), quiet_when_piped(always=quiet):
        before = _made(api, repository, public=public)
        _refuse_strangers(before, folder)
        _upload(api, folder, repository)
        after = _looked_up(api, repository)
    _compare(after, manifest.shards)
    return Pushed(repository, after.sha or "", bool(after.private), after.sha == before.sha, len(manifest.shards))


def _looked_up(api: HfApi, repository: str) -> ModelInfo:
    return api.model_info(repository, files_metadata=True)


def _made(api: HfApi, repository: str, *, public: bool) -> ModelInfo:
    """The repository as it is before the upload; it is made if need be, and is never more public than was asked for."""
    from huggingface_hub import errors as hub

    try:
        found = _looked_up(api, repository)
    except hub.GatedRepoError:
        raise
    except hub.RepositoryNotFoundError:
        api.create_repo(repository, private=not public, exist_ok=True)
        found = _looked_up(api, repository)
    if not found.private and not public:
        raise RecipeError(f"{repository}: everyone can see it; say --public if that is meant, or name another one")
    return found


def _refuse_strangers(found: ModelInfo, folder: Path) -> None:
    """Weights of another model would be loaded instead of this one's, or beside them."""
    there = {file.rfilename for file in found.siblings or () if "/" not in file.rfilename}
    own = {path.name for path in folder.iterdir()}
    strangers = sorted(name for name in there - own if name.endswith((*SUFFIXES, _INDEX)))
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise RecipeError(
            f"{found.id}: holds {', '.join(strangers[:3])}{more}, which this model has not, and which would be "
            "taken for a part of it; delete them there, or push to another repository"
        )


def _upload(api: HfApi, folder: Path, repository: str) -> None:
    """Every file of the folder; a file that is there already is not sent again.

    upload_folder streams a large one in several commits, which upload_large_folder was for in older versions. That one
    is not used there: whatever the Hub answers, it tries for ever, and it keeps its notes in the model's folder.
    """
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message=_MESSAGE)


def _compare(found: ModelInfo, shards: Mapping[str, str]) -> None:
    """VerifyError where the Hub has other shards than the manifest names."""
    there = {file.rfilename: file.lfs for file in found.siblings or ()}
    faults = [f"{found.id}: {file}: did not arrive" for file in shards if file not in there]
    for file, sha256 in shards.items():
        stored = there.get(file)
        if stored is not None and stored.sha256 != sha256:
            faults.append(f"{found.id}: {file}: its SHA-256 is {stored.sha256}, but {sha256} in merger.json")
    if faults:
        raise VerifyError("\n".join(faults))


# --- errors ---------------------------------------------------------------------------------------


@contextmanager
def _without_log() -> Iterator[None]:
    """Without huggingface_hub's own remarks: those on what it tries again hold URLs, and these may hold credentials."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line, without its URLs: they may hold credentials."""
    # ValueError: an answer that it does not understand
    expected: tuple[type[BaseException], ...] = (*connection_errors(), ValueError)
    try:
        yield
    except expected as error:
        _explain(error, repository)


def _explain(error: BaseException, repository: str) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    host = urlsplit(constants.ENDPOINT).hostname
    while not isinstance(error, hub.HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # uploads side by side wrap what went wrong
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    if isinstance(error, hub.GatedRepoError):
        said = "is gated; ask for access on its page, then `hf auth login`"
    elif status == 401:
        said = f"{host} does not know you; `hf auth login`, or set HF_TOKEN to a token that may write"
    elif status == 403:
        said = "your token may not write there; take one that may, or another name"
    elif isinstance(error, hub.RepositoryNotFoundError):
        said = f"is not on {host}, or not for you; mend the name, or `hf auth login`"
    elif 400 <= status < 500 and status not in (408, 429):
        said = f"{host} refuses it ({status}{_reason(error)})"
    elif isinstance(error, FileNotFoundError | PermissionError) and error.filename:
        raise ResourceError(f"{error.filename}: cannot be read: {system_reason(error)}") from None
    else:
        what = str(status) if status else type(error).__name__
        raise ResourceError(
            f"{repository}: {host} could not be reached, or broke off ({what}); "
            "push again, and it goes on with what is missing"
        ) from None
    raise RecipeError(f"{repository}: {said}") from None


def _reason(error: BaseException) -> str:
    """What the Hub says of it, in a line, and not a word of it if the token is among that."""
    from huggingface_hub import get_token

    words = " ".join(str(getattr(error, "server_message", None) or "").split())[:300]
    token = get_token()
    return f": {words}" if words and not (token and token in words) else ""
