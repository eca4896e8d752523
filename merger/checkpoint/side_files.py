"""The files beside the weights: manifest, model card, config, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from merger.checkpoint.files import json_bytes, write_bytes
from merger.checkpoint.vocabulary_files import matching_files, read_content, read_object

Form = Literal["model", "pack", "adapter"]
"""The kind of an output: a model, several experts, or an adapter for the base."""
SideFile = Path | Mapping[str, Any]
"""A file to copy, or the content of a JSON file to write."""

_BASE_FILES = (
    "*processor_config.json", "audio_tokenizer_config.json",
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
)  # fmt: skip
"""Patterns of what transformers and sentence-transformers read beside config, weights and tokenizer."""

_MODULES_WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")


def base_files(base: Path) -> dict[str, Path]:
    """The files of the base to copy beside config, weights and tokenizer, by their names in its folder."""
    return matching_files(base, _BASE_FILES)


def uncopied_notes(base: Path, tokenizer: Path) -> list[str]:
    """Notes on code and weights that the configs of the base and of the tokenizer name, and no merge copies."""
    notes = []
    for file in (base / "config.json", tokenizer / "tokenizer_config.json"):
        if names := _code_files(read_object(file).get("auto_map")):
            notes.append(f"{file.name} names code, {', '.join(names)}, which is not copied; copy it if you trust it")
    modules = _modules(base / "modules.json")
    if names := [path for path, kind in modules.items() if kind not in _MODULES_WITHOUT_WEIGHTS]:
        notes.append(f"modules.json names {', '.join(names)}, whose weights are neither merged nor copied")
    return notes


def _code_files(auto_map: Any) -> list[str]:
    """The Python files that a config takes its classes from, but for those in other repositories."""
    entries = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    local = [name for name in names if isinstance(name, str) and "--" not in name]
    return [f"{module}.py" for module in dict.fromkeys(name.partition(".")[0] for name in local)]


def _modules(file: Path) -> dict[str, str]:
    """The folders of a sentence-transformers model, and the class of each."""
    try:
        entries = json.loads(read_content(file)) if file.is_file() else []
    except (ValueError, RecursionError):
        entries = []
    modules = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {str(entry["path"]): str(entry.get("type")).rpartition(".")[2] for entry in modules if entry.get("path")}


def is_inside(name: str) -> bool:
    """Whether the name of a side file leads to no place outside the folder that it is taken from or written to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts


def side_file_content(source: SideFile) -> bytes:
    """The bytes of a side file; UnreadableError where the disk fails."""
    return read_content(source) if isinstance(source, Path) else json_bytes(source)


def write_side_files(files: Mapping[str, SideFile], folder: Path) -> dict[str, str]:
    """Writes content only, so that no file is read-only or older than it should be; returns the SHA-256 of each."""
    digests = {}
    for name, source in files.items():
        content = side_file_content(source)
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, content)
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def extracted_card(title: str, base: str, expert: str, packed: str) -> str:
    """README.md of one expert that was rebuilt from a ``packed`` output."""
    front = {"library_name": "transformers", "base_model": [base], "tags": ["merger"]}
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"The expert {expert}, rebuilt from `{packed}` by `merger extract`.\n"
    )


_FORMS: Mapping[Form, str] = {
    "model": "",
    "pack": "It holds several experts and is no model by itself: `merger extract` writes one of them. ",
    "adapter": "It is a LoRA adapter for the base, which peft loads. ",
}


_QUANTISE = """The base was quantised, and this model is not. Tools that quantise it again, each for its runtime:

- llm-compressor: `python -c "from llmcompressor import model_free_ptq; model_free_ptq('FOLDER', 'FOLDER-quantised', \
scheme='FP8_BLOCK', ignore=['lm_head'])"`
- llama.cpp: `python convert_hf_to_gguf.py FOLDER --outtype q8_0`
- MLX: `mlx_lm.convert --hf-path FOLDER -q`

"""


def card(
    title: str,
    inputs: Mapping[str, Any],
    recipe: Mapping[str, Any],
    tensors: Mapping[str, int],
    form: Form,
    *,
    was_quantised: bool = False,
) -> str:
    """Returns README.md, the card of a merged model, of several experts or of an adapter on the Hub.

    It says how a model is quantised again whose base ``was_quantised``.
    """
    # Only what came from the Hub has a name there: the path of a folder is refused, or taken for someone's repository.
    sources = {"base": inputs["base"]} if form == "adapter" else inputs
    models = dict.fromkeys(record["source"].partition("@")[0] for record in sources.values() if "commit" in record)
    library, relation = ("peft", "adapter") if form == "adapter" else ("transformers", "merge")
    front: dict[str, Any] = {"library_name": library, "tags": ["merge", "merger"]}
    front |= {"base_model": list(models), "base_model_relation": relation} if models else {}
    counts = ", ".join(f"{count} {action}" for action, count in tensors.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"Merged with `merger`. Tensors: {counts}. {_FORMS[form]}"
        "`merger.json` names every input and what happened to each tensor.\n\n"
        f"{_QUANTISE.replace('FOLDER', title) if was_quantised and form == 'model' else ''}"
        f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```\n"
    )
