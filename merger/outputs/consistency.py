"""Whether the files of one checkpoint agree with each other: headers, index, values, config, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merger.checkpoint.checkpoint import PACKED, Checkpoint
from merger.checkpoint.folder import MODEL, Folder, local_folder, read_json
from merger.checkpoint.formats import format_of
from merger.checkpoint.tensor_info import SAFETENSORS_NAMES, Info
from merger.checkpoint.tensor_kinds import TensorKinds, block_of, tensor_kinds, text_config
from merger.checkpoint.tied_weights import tie_word
from merger.checkpoint.wrapped_names import plain_names
from merger.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the files say it is."""

    file: str  # empty where it is about several files together
    tensor: str | None
    what: str

    def __str__(self) -> str:
        """``file: tensor: what``."""
        return ": ".join(part for part in (self.file, self.tensor, self.what) if part)


@dataclass(frozen=True)
class Contents:
    """A checkpoint's folder, as far as it can be read, and what is wrong with the rest."""

    folder: Folder
    headers: Mapping[str, Mapping[str, Info]]  # of every weight file that can be read, with the names stored there
    tensors: Mapping[str, Info]  # all of them, by the model's names
    config: Mapping[str, Any]
    broken: tuple[Difference, ...]

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.folder.directory

    @cached_property
    def kinds(self) -> TensorKinds:
        """The kind of each tensor."""
        return tensor_kinds(self.tensors, self.config)

    @property
    def packed(self) -> bool:
        """Whether the files hold several experts, and no model."""
        return any(file.startswith(PACKED.removesuffix(".safetensors")) for file in self.headers)

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        file = self.tensors[name].file
        assert file is not None, "it was read from a file"
        return file.name


def look(directory: Path) -> Contents:
    """Reads config, index and headers; what cannot be read is a difference."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such folder")
    folder = local_folder(directory, "model")
    broken: list[Difference] = []
    config = _object(folder, "config.json", broken)
    headers: dict[str, Mapping[str, Info]] = {}
    for file in _weight_files(folder, broken):
        try:
            headers[file] = _header(directory / file)
        except CheckpointError as error:
            broken.append(Difference(file, None, _said(error, directory / file)))
    return Contents(folder, headers, _tensors(headers, broken), config, tuple(broken))


def _tensors(headers: Mapping[str, Mapping[str, Info]], broken: list[Difference]) -> dict[str, Info]:
    """All tensors by the model's names, as a merge reads them; by those in the files where that would join two."""
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    try:
        names = plain_names(tensors)
    except ValueError as error:
        broken.append(Difference("", None, str(error)))
        return tensors
    return {names[stored]: info for stored, info in tensors.items()}


def _header(path: Path) -> Mapping[str, Info]:
    format_ = format_of(path.name)
    if format_ is None:
        raise CheckpointError(f"{path}: is of no format that a model is read from")
    return format_.header(path)


def _weight_files(folder: Folder, broken: list[Difference]) -> list[str]:
    """The weight files that transformers would load, or `extract`: one whole, or those that an index names."""
    for name in (*MODEL, PACKED):
        if name in folder.names:
            return [name]
        if (index := f"{name}.index.json") in folder.names:
            named = _weight_map(_object(folder, index, broken), index, broken)
            missing = sorted({file for file in named.values() if file not in folder.names})
            broken += [Difference(file, None, f"is missing, though {index} names it") for file in missing]
            return sorted(set(named.values()) - set(missing))
    broken.append(Difference(MODEL[0], None, f"is missing, and there is no {' or '.join(MODEL[1:])} nor an index"))
    return []


def _weight_map(index: Mapping[str, Any], name: str, broken: list[Difference]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        broken.append(Difference(name, None, "has no weight_map of names to files"))
        return {}
    return found


def _object(folder: Folder, name: str, broken: list[Difference]) -> dict[str, Any]:
    """A JSON object of the folder; an empty one, and a difference, where it cannot be read."""
    try:
        return read_json(folder, name)
    except CheckpointError as error:
        where = f"{folder.label}: {folder.source}"
        broken.append(Difference(name, None, str(error).removeprefix(f"{where}/{name}: ").removeprefix(f"{where} ")))
        return {}


def _said(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


# --- index and headers ----------------------------------------------------------------------------


def index_differences(contents: Contents) -> Iterator[Difference]:
    """Where the index and the headers name different tensors, or two files hold the same one."""
    holders: dict[str, list[str]] = {}
    for file, header in contents.headers.items():
        for name in header:
            holders.setdefault(name, []).append(file)
    for name, files in holders.items():
        if len(files) > 1:
            yield Difference(files[1], name, f"is in {files[0]} as well")
    every = (*MODEL, PACKED)
    index = next((f"{name}.index.json" for name in every if f"{name}.index.json" in contents.folder.names), None)
    if index is None or set(contents.headers) & set(every):
        return
    named = _weight_map(_object(contents.folder, index, []), index, [])
    for name, file in named.items():
        if file in contents.headers and name not in contents.headers[file]:
            yield Difference(file, name, f"is not there, though {index} says so")
    for name, files in holders.items():
        if name not in named:
            yield Difference(index, name, f"is not named, though {files[0]} holds it")


# --- values ---------------------------------------------------------------------------------------


def scan(path: Path, header: Mapping[str, Info], tell: Callable[[int], None]) -> tuple[str | None, list[Difference]]:
    """The SHA-256 of a weight file, where its format is hashed by the way, and its values that are not finite."""
    format_ = format_of(path.name)
    assert format_ is not None, "its header was read"
    report = format_.scan(path, header, tell)
    return report.sha256, [_not_finite(path.name, name, count) for name, count in report.not_finite.items()]


def _not_finite(file: str, tensor: str, count: int) -> Difference:
    return Difference(file, tensor, f"holds {count:,} {'value' if count == 1 else 'values'} of NaN or infinity")


# --- config ---------------------------------------------------------------------------------------


def config_differences(contents: Contents) -> Iterator[Difference]:
    """Where config.json and the tensors say different things of vocabulary, head, dtype and blocks."""
    if not contents.config or not contents.tensors:
        return
    yield from _vocabulary(contents)
    yield from _head(contents)
    yield from _dtype(contents)
    yield from _blocks(contents)


def _vocabulary(contents: Contents) -> Iterator[Difference]:
    size = text_config(contents.config).get("vocab_size")
    for name in (contents.kinds.embedding, contents.kinds.head):
        if type(size) is int and name is not None and (rows := contents.tensors[name].shape[0]) != size:
            yield Difference("config.json", name, f"has {rows:,} rows, but vocab_size is {size:,}")


def _head(contents: Contents) -> Iterator[Difference]:
    config, head, embedding = contents.config, contents.kinds.head, contents.kinds.embedding
    word = tie_word(config)
    causal = "ForCausalLM" in str(config.get("architectures")) or "LMHead" in str(config.get("architectures"))
    if word is False and head is None and causal and embedding is not None:
        yield Difference("config.json", None, "says tie_word_embeddings: false, but there is no head")
    elif word is True and head is not None and embedding is not None and not config.get("is_encoder_decoder"):
        with Checkpoint("model", contents.directory, contents.tensors, {}) as opened:
            same = opened.equal(head, embedding)
        if not same:
            what = f"is not {embedding}, though config.json says tie_word_embeddings: true"
            yield Difference(contents.file_of(head), head, what)


def _dtype(contents: Contents) -> Iterator[Difference]:
    """A config names the dtype in which a model is loaded; most of its numbers should be of it."""
    said = str(contents.config.get("dtype") or contents.config.get("torch_dtype")).removeprefix("torch.")
    stored: Counter[str] = Counter()
    for info in contents.tensors.values():
        stored[info.dtype] += info.elements if info.is_float else 0
    if said not in SAFETENSORS_NAMES or not stored.total() or contents.config.get("quantization_config"):
        return
    most = stored.most_common(1)[0][0]
    if most != SAFETENSORS_NAMES[said]:
        yield Difference("config.json", None, f"says dtype {said}, but most numbers are {most}")


def _blocks(contents: Contents) -> Iterator[Difference]:
    """The blocks beside the embedding, as in model.embed_tokens and model.layers, of which none may be missing."""
    embedding = contents.kinds.embedding or ""
    blocks = f"{embedding.removesuffix('weight').rstrip('.').rpartition('.')[0]}.layers".lstrip(".")
    wanted = text_config(contents.config).get("num_hidden_layers")
    if type(wanted) is not int or blocks not in contents.kinds.blocks:
        return
    there = {block_of(name) for name in contents.tensors if name.startswith(f"{blocks}.")}
    for missing in sorted(set(range(wanted)) - there):
        yield Difference("config.json", f"{blocks}.{missing}", f"is missing, but num_hidden_layers is {wanted}")


# --- tokenizer ------------------------------------------------------------------------------------


def tokenizer_differences(contents: Contents) -> Iterator[Difference]:
    """Tokens whose number is beyond the embedding's rows."""
    embedding = contents.kinds.embedding
    if embedding is None:
        return
    rows = contents.tensors[embedding].shape[0]
    for file, numbers in _TOKENS.items():
        broken: list[Difference] = []
        said = _object(contents.folder, file, broken) if file in contents.folder.names else {}
        yield from broken if file != "config.json" else ()  # which is told of already
        beyond = {number: token for token, number in numbers(said) if type(number) is int and number >= rows}
        if beyond:
            what = f"{beyond[min(beyond)]!r} is number {min(beyond):,}, but {embedding} has {rows:,} rows"
            more = f"; so are {len(beyond) - 1:,} more" if len(beyond) > 1 else ""
            yield Difference(file, None, what + more)


def _of_tokenizer(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    model, added = said.get("model"), said.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        yield from ((str(each[:1]), i) for i, each in enumerate(vocabulary) if isinstance(each, list))
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict):
            yield str(each.get("content")), each.get("id")


def _of_tokenizer_config(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    added = said.get("added_tokens_decoder")
    for number, each in added.items() if isinstance(added, dict) else ():
        if number.isdecimal() and isinstance(each, dict):
            yield str(each.get("content")), int(number)


def _of_config(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = text_config(said).get(key)
        for number in value if isinstance(value, list) else [value]:
            yield key, number


def _of_vocabulary(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from said.items()


_TOKENS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Any]]]] = {
    "tokenizer.json": _of_tokenizer,
    "tokenizer_config.json": _of_tokenizer_config,
    "added_tokens.json": _of_vocabulary,
    "vocab.json": _of_vocabulary,
    "config.json": _of_config,
    "generation_config.json": _of_config,
}
