"""What is written beside the weights: manifest, model card, config, tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from merger.checkpoint.files import write_bytes
from merger.errors import UnreadableError

# what transformers reads beside config and weights; licences and code are the user's to copy
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "*chat_template.jinja",
)  # fmt: skip
_BASE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def side_files(base: Path, tokenizer: Path) -> dict[str, Path]:
    """Files to copy, by name: the tokenizer's from one model, the rest from the base."""
    found = {path.name: path for pattern in _BASE for path in sorted(base.glob(pattern)) if path.is_file()}
    for pattern in _TOKENIZER:
        found |= {path.name: path for path in sorted(tokenizer.glob(pattern)) if path.is_file()}
    return found


def copy_side_files(files: Mapping[str, Path], to: Path) -> dict[str, str]:
    """Copies content only, so that no file is read-only or older than it should be; the SHA-256 of each."""
    found = {}
    for name, path in files.items():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from None
        write_bytes(to / name, content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def extracted_card(title: str, base: str, expert: str, packed: str) -> str:
    """README.md of one expert that was rebuilt from a ``packed`` output."""
    front = {"library_name": "transformers", "base_model": [base], "tags": ["merger"]}
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"The expert {expert}, rebuilt from `{packed}` by `merger extract`.\n"
    )


_PACKED = "It holds several experts and is no model by itself: `merger extract` writes one of them. "


def card(
    title: str, inputs: Mapping[str, Any], recipe: Mapping[str, Any], tensors: Mapping[str, int], packed: bool
) -> str:
    """README.md: what the Hub shows of a merged model, or of several ``packed`` experts."""
    # Only what came from the Hub has a name there: the path of a folder is refused, or taken for someone's repository.
    models = dict.fromkeys(each["source"].partition("@")[0] for each in inputs.values() if "commit" in each)
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "merger"]}
    front |= {"base_model": list(models), "base_model_relation": "merge"} if models else {}
    counts = ", ".join(f"{count} {what}" for what, count in tensors.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"Merged with `merger`. Tensors: {counts}. {_PACKED if packed else ''}"
        "`merger.json` names every input and what happened to each tensor.\n\n"
        f"```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)}```\n"
    )
