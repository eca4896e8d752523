"""Whether the files of one checkpoint agree with each other: headers, index, values, config, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merger.checkpoint.adapter_config import CONFIG
from merger.checkpoint.checkpoint import PACKED, Checkpoint
from merger.checkpoint.folder import ADAPTER, MODEL, Folder, local_folder, read_json
from merger.checkpoint.formats import format_of
from merger.checkpoint.near_paths import missing_path
from merger.checkpoint.opening import is_adapter
from merger.checkpoint.tensor_info import SAFETENSORS_NAMES, Info
from merger.checkpoint.tensor_kinds import TensorKinds, block_of, tensor_kinds, text_config
from merger.checkpoint.tied_weights import tie_word
from merger.checkpoint.wrapped_names import plain_names
from merger.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """One fault: a file or a tensor that differs from its description in another file."""

    file: str  # empty where it is about several files together
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """``file: tensor: what``."""
        return ": ".join(part for part in (self.file, self.tensor, self.what) if part)


@dataclass(frozen=True)
class Contents:
    """A checkpoint's folder: its readable headers and config, and the faults of unreadable files."""

    folder: Folder
    headers: Mapping[str, Mapping[str, Info]]  # of every weight file that can be read, with the names stored there
    tensors: Mapping[str, Info]  # all of them, by the model's names
    config: Mapping[str, Any]
    faults: tuple[Difference, ...]

    @property
    def directory(self) -> Path:
        """The directory of the files."""
        return self.folder.directory

    @cached_property
    def kinds(self) -> TensorKinds:
        """The kind of each tensor."""
        return tensor_kinds(self.tensors, self.config)

    @property
    def is_model(self) -> bool:
        """Whether the files hold a model, and neither several experts nor an adapter."""
        is_packed = any(file.startswith(PACKED.removesuffix(".safetensors")) for file in self.headers)
        return not is_packed and not is_adapter(self.folder)

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        file = self.tensors[name].file
        assert file is not None, "it was read from a file"
        return file.name


def read_contents(directory: Path) -> Contents:
    """Reads config, index and headers; an unreadable file is a fault."""
    if not directory.is_dir():
        raise CheckpointError(missing_path(directory, "folder", Path.is_dir))
    folder = local_folder(directory, "model")
    faults: list[Difference] = []
    config = _read_object(folder, CONFIG if is_adapter(folder) else "config.json", faults)
    headers: dict[str, Mapping[str, Info]] = {}
    for file in _weight_files(folder, faults):
        try:
            headers[file] = _read_header(directory / file)
        except CheckpointError as error:
            faults.append(Difference(file, None, _message_without_path(error, directory / file)))
    return Contents(folder, headers, _model_tensors(headers, faults), config, tuple(faults))


def _model_tensors(headers: Mapping[str, Mapping[str, Info]], faults: list[Difference]) -> dict[str, Info]:
    """Returns all tensors by the names that a merge gives them; by the stored names if two tensors get one name."""
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    try:
        names = plain_names(tensors)
    except ValueError as error:
        faults.append(Difference("", None, str(error)))
        return tensors
    return {names[stored]: info for stored, info in tensors.items()}


def _read_header(path: Path) -> Mapping[str, Info]:
    format_ = format_of(path.name)
    if format_ is None:
        raise CheckpointError(f"{path}: is of no format that a model is read from")
    return format_.header(path)


def _weight_files(folder: Folder, faults: list[Difference]) -> list[str]:
    """Returns the weight files that are loaded of the folder: a single file, or the files of an index."""
    for name in ADAPTER if is_adapter(folder) else (*MODEL, PACKED):
        if name in folder.names:
            return [name]
        if (index := f"{name}.index.json") in folder.names:
            weight_map = _weight_map(_read_object(folder, index, faults), index, faults)
            missing = sorted({file for file in weight_map.values() if file not in folder.names})
            faults += [Difference(file, None, f"is missing, though {index} names it") for file in missing]
            return sorted(set(weight_map.values()) - set(missing))
    expected, *others = ADAPTER if is_adapter(folder) else MODEL
    faults.append(Difference(expected, None, f"is missing, and there is no {' or '.join(others)} nor an index"))
    return []


def _weight_map(index: Mapping[str, Any], name: str, faults: list[Difference]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        faults.append(Difference(name, None, "has no weight_map of names to files"))
        return {}
    return weight_map


def _read_object(folder: Folder, name: str, faults: list[Difference]) -> dict[str, Any]:
    """Reads a JSON object of the folder; for an unreadable file, appends a fault and returns an empty object."""
    try:
        return read_json(folder, name)
    except CheckpointError as error:
        label = f"{folder.label}: {folder.source}"
        faults.append(Difference(name, None, str(error).removeprefix(f"{label}/{name}: ").removeprefix(f"{label} ")))
        return {}


def _message_without_path(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


# --- index and headers ----------------------------------------------------------------------------


def index_differences(contents: Contents) -> Iterator[Difference]:
    """Yields tensors that only the index or only a header names, and tensors in more than one file."""
    holders: dict[str, list[str]] = {}
    for file, header in contents.headers.items():
        for name in header:
            holders.setdefault(name, []).append(file)
    for name, files in holders.items():
        if len(files) > 1:
            yield Difference(files[1], name, f"is in {files[0]} as well")
    weight_files = (*MODEL, PACKED)
    index = next((f"{name}.index.json" for name in weight_files if f"{name}.index.json" in contents.folder.names), None)
    if index is None or set(contents.headers) & set(weight_files):
        return
    weight_map = _weight_map(_read_object(contents.folder, index, []), index, [])
    for name, file in weight_map.items():
        if file in contents.headers and name not in contents.headers[file]:
            yield Difference(file, name, f"is not there, though {index} says so")
    for name, files in holders.items():
        if name not in weight_map:
            yield Difference(index, name, f"is not named, though {files[0]} holds it")


# --- values ---------------------------------------------------------------------------------------


def scan(path: Path, header: Mapping[str, Info], tell: Callable[[int], None]) -> tuple[str | None, list[Difference]]:
    """Returns a weight file's SHA-256, if a scan of its format computes one, and the tensors that are not finite."""
    format_ = format_of(path.name)
    assert format_ is not None, "its header was read"
    report = format_.scan(path, header, tell)
    return report.sha256, [_not_finite(path.name, name, count) for name, count in report.not_finite.items()]


def _not_finite(file: str, tensor: str, count: int) -> Difference:
    return Difference(file, tensor, f"holds {count:,} {'value' if count == 1 else 'values'} of NaN or infinity")


# --- config ---------------------------------------------------------------------------------------


def config_differences(contents: Contents) -> Iterator[Difference]:
    """Yields contradictions between config.json and the tensors: vocabulary, head, dtype and blocks."""
    if not contents.config or not contents.tensors:
        return
    yield from _vocabulary_differences(contents)
    yield from _head_differences(contents)
    yield from _dtype_differences(contents)
    yield from _block_differences(contents)


def _vocabulary_differences(contents: Contents) -> Iterator[Difference]:
    size = text_config(contents.config).get("vocab_size")
    for name in (contents.kinds.embedding, contents.kinds.head):
        if type(size) is int and name is not None and (rows := contents.tensors[name].shape[0]) != size:
            yield Difference("config.json", name, f"has {rows:,} rows, but vocab_size is {size:,}")


def _head_differences(contents: Contents) -> Iterator[Difference]:
    config, head, embedding = contents.config, contents.kinds.head, contents.kinds.embedding
    word = tie_word(config)
    causal = "ForCausalLM" in str(config.get("architectures")) or "LMHead" in str(config.get("architectures"))
    if word is False and head is None and causal and embedding is not None:
        yield Difference("config.json", None, "says tie_word_embeddings: false, but there is no head")
    elif word is True and head is not None and embedding is not None and not config.get("is_encoder_decoder"):
        with Checkpoint("model", contents.directory, contents.tensors, {}) as checkpoint:
            is_tied = checkpoint.equal(head, embedding)
        if not is_tied:
            message = f"is not {embedding}, though config.json says tie_word_embeddings: true"
            yield Difference(contents.file_of(head), head, message)


def _dtype_differences(contents: Contents) -> Iterator[Difference]:
    """Yields a difference if config.json names another dtype than that of most values."""
    config_dtype = str(contents.config.get("dtype") or contents.config.get("torch_dtype")).removeprefix("torch.")
    stored: Counter[str] = Counter()
    for info in contents.tensors.values():
        stored[info.dtype] += info.elements if info.is_float else 0
    if config_dtype not in SAFETENSORS_NAMES or not stored.total() or contents.config.get("quantization_config"):
        return
    main_dtype = stored.most_common(1)[0][0]
    if main_dtype != SAFETENSORS_NAMES[config_dtype]:
        yield Difference("config.json", None, f"says dtype {config_dtype}, but most numbers are {main_dtype}")


def _block_differences(contents: Contents) -> Iterator[Difference]:
    """Yields the missing blocks of the list next to the embedding, as in model.embed_tokens and model.layers."""
    embedding = contents.kinds.embedding or ""
    blocks = f"{embedding.removesuffix('weight').rstrip('.').rpartition('.')[0]}.layers".lstrip(".")
    block_count = text_config(contents.config).get("num_hidden_layers")
    if type(block_count) is not int or blocks not in contents.kinds.blocks:
        return
    block_numbers = {block_of(name) for name in contents.tensors if name.startswith(f"{blocks}.")}
    for missing in sorted(set(range(block_count)) - block_numbers):
        yield Difference("config.json", f"{blocks}.{missing}", f"is missing, but num_hidden_layers is {block_count}")


# --- tokenizer ------------------------------------------------------------------------------------


def tokenizer_differences(contents: Contents) -> Iterator[Difference]:
    """Yields the files with token numbers beyond the embedding's rows."""
    embedding = contents.kinds.embedding
    if embedding is None:
        return
    rows = contents.tensors[embedding].shape[0]
    for file, numbers in _TOKENS.items():
        faults: list[Difference] = []
        content = _read_object(contents.folder, file, faults) if file in contents.folder.names else {}
        yield from faults if file != "config.json" else ()  # read_contents reports config.json
        tokens_beyond = {number: token for token, number in numbers(content) if type(number) is int and number >= rows}
        if tokens_beyond:
            lowest = min(tokens_beyond)
            message = f"{tokens_beyond[lowest]!r} is number {lowest:,}, but {embedding} has {rows:,} rows"
            remainder = f"; so are {len(tokens_beyond) - 1:,} more" if len(tokens_beyond) > 1 else ""
            yield Difference(file, None, message + remainder)


def _tokenizer_tokens(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model, added_tokens = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        yield from ((str(entry[:1]), i) for i, entry in enumerate(vocabulary) if isinstance(entry, list))
    for entry in added_tokens if isinstance(added_tokens, list) else ():
        if isinstance(entry, dict):
            yield str(entry.get("content")), entry.get("id")


def _tokenizer_config_tokens(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    added_tokens = content.get("added_tokens_decoder")
    for number, entry in added_tokens.items() if isinstance(added_tokens, dict) else ():
        if number.isdecimal() and isinstance(entry, dict):
            yield str(entry.get("content")), int(number)


def _config_tokens(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = text_config(content).get(key)
        for number in value if isinstance(value, list) else [value]:
            yield key, number


def _vocabulary_tokens(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from content.items()


_TOKENS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]] = {
    "tokenizer.json": _tokenizer_tokens,
    "tokenizer_config.json": _tokenizer_config_tokens,
    "added_tokens.json": _vocabulary_tokens,
    "vocab.json": _vocabulary_tokens,
    "config.json": _config_tokens,
    "generation_config.json": _config_tokens,
}
