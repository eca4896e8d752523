"""Repositories of the Hugging Face Hub, through huggingface_hub: its cache, its token, its offline switch."""

from __future__ import annotations

import errno
import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, cast
from urllib.parse import urlsplit

from merger.checkpoint.folder import Folder, local_folder
from merger.checkpoint.formats import SUFFIXES
from merger.errors import CheckpointError, ResourceError, system_reason

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_REPOSITORY = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*(?:@[^@\s]+)?", re.ASCII)
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")  # config, tokenizer, templates; never code
_SMALL_IN_FOLDERS = ("additional_chat_templates/*.jinja", "[0-9]*_*/config.json")


def is_repository(source: str) -> bool:
    """Whether it could be name or org/name, with or without @revision, rather than a path."""
    return _REPOSITORY.fullmatch(source) is not None and ".." not in source.partition("@")[0]


def open_repository(source: str, *, label: str, offline: bool) -> Folder:
    """The repository ``source`` with its small files in the cache; its weights may still be on the Hub."""
    from huggingface_hub import HfApi, constants

    repository, _, revision = source.partition("@")
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(source, label=label)
    with _explained(source, label):
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        small = [name for name in sizes if _is_small(name)]
        directory = _download(source, small)
    remote = partial(_open_remote, source, label, directory.name, sizes)
    return Folder(label, source, directory, frozenset(sizes), directory.name, remote)


def _is_small(name: str) -> bool:
    """Whether a plan may need the file's content."""
    return ("/" not in name and name.endswith(_SMALL)) or any(fnmatch(name, pattern) for pattern in _SMALL_IN_FOLDERS)


def weight_hashes(source: str, commit: str, label: str) -> dict[str, str]:
    """Returns the SHA-256 of a repository's weight files from the Hub, without a download."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return {}  # the commit says it all
    with _explained(source, label):
        info = HfApi().model_info(source.partition("@")[0], revision=commit, files_metadata=True)
    return {
        file.rfilename: file.lfs.sha256
        for file in info.siblings or ()
        if file.lfs is not None and file.rfilename.endswith(SUFFIXES)
    }


def download(folder: Folder, names: Iterable[str]) -> Folder:
    """The folder with the files ``names`` in the cache as well."""
    missing = [name for name in names if not folder.has(name)]
    if missing and folder.remote is not None:
        with _explained(folder.source, folder.label):
            _download(folder.source, missing, folder.commit)
    return replace(folder, remote=None)


def _download(source: str, names: list[str], commit: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    with quiet_when_piped():
        # A branch goes by its name, not by its commit, so that the cache knows it when offline.
        return Path(snapshot_download(repository, revision=commit or revision or None, allow_patterns=names))


@contextmanager
def quiet_when_piped(*, always: bool = False) -> Iterator[None]:
    """Keeps progress bars out of log files, unless the environment asks for them; ``always`` off terminals too."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in its __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    drawn = sys.stderr.isatty() and not always
    if asked_for or drawn or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_cached(source: str) -> bool:
    """Whether the Hub's cache has the repository ``source``, as far as its config tells."""
    return _cached_directory(source, "the cache") is not None


def _cached_directory(source: str, label: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = source.partition("@")
    for name in ("config.json", "adapter_config.json"):
        with _explained(source, label):
            path = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _cached(source: str, *, label: str) -> Folder:
    from huggingface_hub import constants

    directory = _cached_directory(source, label)
    if directory is not None:
        return replace(local_folder(directory, label, directory.name), source=source)
    raise CheckpointError(
        f"{label}: {source} is neither a folder nor in the Hub cache ({constants.HF_HUB_CACHE}), and offline "
        "nothing is downloaded; run it once without offline=True and HF_HUB_OFFLINE"
    )


# --- a file of which only what is read is fetched ---


def _open_remote(source: str, label: str, commit: str, sizes: dict[str, int | None], name: str) -> IO[bytes]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _explained(source, label):
        url = hf_hub_url(source.partition("@")[0], name, revision=commit)
        size = sizes[name]
        if size is None:  # not every mirror tells the sizes of files with their names
            size = get_hf_file_metadata(url).size or 0
    return io.BufferedReader(_RemoteFile(url, size, source, label), 128 << 10)


class _RemoteFile(io.RawIOBase):
    """A file on the Hub, read by range requests."""

    def __init__(self, url: str, size: int, source: str, label: str) -> None:
        self._url = url
        self._size = size
        self._source_and_label = (source, label)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in its __all__
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        if stop <= self._position:
            return 0
        with _explained(*self._source_and_label):
            response = get_session().get(
                self._url,
                headers={**build_hf_headers(), "Range": f"bytes={self._position}-{stop - 1}"},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            hf_raise_for_status(response)
        content = response.content
        if response.status_code != 206 or len(content) != stop - self._position:
            source, label = self._source_and_label
            raise CheckpointError(f"{label}: the Hub did not send the part of {source} that was asked for; try again")
        view[: len(content)] = content
        self._position = stop
        return len(content)


# --- errors ---


@contextmanager
def _explained(source: str, label: str) -> Iterator[None]:
    """Translates huggingface_hub's exceptions into one line without URLs, which may hold credentials."""
    try:
        yield
    except connection_errors() as error:
        _explain(error, source, label)


def connection_errors() -> tuple[type[BaseException], ...]:
    """Returns huggingface_hub's exceptions for refused and unanswered requests."""
    from huggingface_hub import errors as hub

    # Its HTTP library is requests, httpx or httpx2, by version; the bases of its own error are that library's.
    http = cast("tuple[type[Exception], ...]", hub.HfHubHTTPError.__bases__)
    return (*http, OSError, hub.HFValidationError, RuntimeError)  # RuntimeError: hf_xet's


def _explain(error: BaseException, source: str, label: str) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    repository, _, revision = source.partition("@")
    if isinstance(error, hub.GatedRepoError):
        reason = f"{repository} is gated; ask for access on its page, then `hf auth login`"
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = (
            f"there is no folder {source}, and no repository {repository} that the Hub shows you; "
            "mend the name, or `hf auth login` if it is private"
        )
    elif isinstance(error, hub.RevisionNotFoundError):
        reason = f"{repository} has no revision {revision}; give a branch, a tag or a whole commit hash"
    elif isinstance(error, hub.HFValidationError):
        reason = f"{source} is neither a folder nor org/name[@revision]"
    elif isinstance(error, hub.HfHubHTTPError):
        reason = f"the Hub answered {error.response.status_code} for {repository}; try again, or `hf auth login`"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(f"{label}: the disk of {constants.HF_HUB_CACHE} is full; set HF_HOME elsewhere") from None
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        reason = f"{error.filename or constants.HF_HUB_CACHE}: {system_reason(error)}"
    else:
        host = urlsplit(constants.ENDPOINT).hostname
        reason = (
            f"there is no folder {source}, and {repository} could not be fetched from {host} "
            f"({type(error).__name__}); check the connection and the name, "
            "or use what is in the cache with offline=True"
        )
    raise CheckpointError(f"{label}: {reason}") from None
