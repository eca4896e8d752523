"""The sections of a recipe and their keys, as data that is checked when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from merger.checkpoint.renaming import check_rename
from merger.pipeline.parameters import Number
from merger.pipeline.registry import Stage

Kind = Literal["linear", "conv1d", "head", "tied", "embedding", "vector", "expert3d", "other", "buffer"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_SIZE = re.compile(r"^\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kKmMgGtT]?)(i?)[bB]?\s*$")


class Section(BaseModel):
    """Keys and values; an unknown key is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _location(text: str) -> str:
    parts = [len(os.fsencode(part)) for part in text.split("/")]
    if max(parts) > 255 or sum(parts) > 2000 or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"is {text[:80]!r}, which no folder can be named")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError(f"there is no home folder {text.partition('/')[0]}")
    return text


def is_location(value: Any) -> TypeGuard[str]:
    """Whether a value is text that a folder or file could be named."""
    try:
        return isinstance(value, str) and bool(value) and bool(_location(value))
    except ValueError:
        return False


Location = Annotated[str, Field(min_length=1), AfterValidator(_location)]


class Source(Section):
    """A checkpoint: a folder, or a Hub repository with an optional @revision, and an adapter on top of it."""

    model: Location = Field(description="A folder, or a repository of the Hub as org/name or org/name@revision.")
    adapter: Location | None = Field(
        default=None, description="A PEFT LoRA adapter on top of the model: a folder or repository."
    )
    rename: Annotated[dict[str, str], AfterValidator(check_rename)] = Field(
        default_factory=dict,
        description="Other names for the model's tensors: regular expressions and what replaces their matches, as in "
        "{'^model\\.': model.language_model.}.",
    )


class Expert(Source):
    """A fine-tune of the base, or an adapter for it."""

    weight: Number = Field(Fraction(1), description="How much the expert counts, for methods that take weights.")


def source_of(value: Any) -> Any:
    """A model's location alone as keys and values."""
    if isinstance(value, bool | int | float):
        raise ValueError(f"is {value}, expected a folder or repository, or {{model: ...}}; put a name in quotes")
    return {"model": value} if isinstance(value, str) else value


def byte_size(value: Any) -> Any:
    """5GB, 500 MiB or a plain number of bytes, as a number of bytes; anything else as it is."""
    if isinstance(value, str) and (match := _SIZE.match(value)):
        step = 1024 if match[3] else 1000
        return int(Fraction(match[1]) * step ** (" kmgt".index(match[2].lower() or " ")))
    return value


UNION = "union"
"""The word for the tokens of all models, in place of the name of one."""


ROW_SOURCES = ("base", "mean", "zero")
"""The sources of a token's row that are no expert."""


class TokenRow(Section):
    """The source of one token's row in the tables of the output."""

    source: str = Field(
        alias="from", description="`base`, an expert, `mean` of the experts that have the token, or `zero`."
    )


class Output(Section):
    """Where the merged checkpoint goes, and in what form."""

    path: Location = Field(description="The folder to write, relative to the recipe; it appears when it is complete.")
    form: Literal["model", "adapter"] = Field(
        "model", description="`model`, or `adapter`: a PEFT LoRA adapter that holds the changes of the linear layers."
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Of an adapter's factors; left out, the sum of those of the experts, if all are adapters.",
    )
    dtype: DType | None = Field(
        default=None,
        description="How numbers are stored; left out, as each tensor of the base is, and an adapter as float32.",
    )
    shard_size: Annotated[int, BeforeValidator(byte_size, json_schema_input_type=int | str), Field(ge=1)] = Field(
        5_000_000_000, description="The most bytes of a weight file: a number, or as in 5GB or 500MiB."
    )
    tokenizer: str | None = Field(
        default=None,
        description="The older place of the recipe's `tokenizer`.",
    )
    pad_rows_to: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Rows of zeros make the rows of the vocabulary a multiple of this number."
    )


def output_of(value: Any) -> Any:
    """An output, unchanged; ValueError with an example for one that is neither a path nor keys and values."""
    if isinstance(value, bool | int | float):
        raise ValueError(f"is {value}, expected a folder, as in output: out; put a name in quotes")
    return value


# --- text -----------------------------------------------------------------------------------------

_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+){0,2}")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".md")
"""The ends of files of text that are no names of Hub datasets."""


def is_dataset(source: str) -> bool:
    """Whether a source of text that is no file could be a dataset of the Hub."""
    return _DATASET.fullmatch(source) is not None and not source.lower().endswith(TEXT_SUFFIXES)


Role = Literal["text", "prompt", "messages", "target", "answer", "choices"]
"""What a column of a record is taken for."""


class TextSource(Section):
    """Text from one file or Hub dataset: how much of it, and from which columns."""

    file: Location = Field(
        description="JSON Lines, JSON, Parquet or text, relative to the recipe; or NAME, NAME:SPLIT or "
        "NAME:CONFIG:SPLIT on the Hub."
    )
    samples: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The most samples of this source; left out, its share of the section's `samples`."
    )
    fields: dict[Role, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict,
        description="The columns of text, prompt, messages, target, answer and choices, if called otherwise.",
    )


def _form(value: Any) -> str:
    if isinstance(value, Mapping | TextSource):
        return "source"
    return "list" if isinstance(value, list) else "location"


def _form_of_all(value: Any) -> str:
    return "by_expert" if isinstance(value, Mapping) else _form(value)


_OneText = Annotated[
    Annotated[Location, Tag("location")] | Annotated[TextSource, Tag("source")],
    Discriminator(_form),
]
_Texts = Annotated[list[_OneText], Field(min_length=1)]
TextData = Annotated[
    Annotated[Location, Tag("location")] | Annotated[TextSource, Tag("source")] | Annotated[_Texts, Tag("list")],
    Discriminator(_form),
]
"""A file or Hub dataset, the same with counts and columns, or a list of either."""
TextDataOfAll = Annotated[
    Annotated[Location, Tag("location")]
    | Annotated[_Texts, Tag("list")]
    | Annotated[dict[str, TextData], Tag("by_expert")],
    Discriminator(_form_of_all),
]
"""Text for every expert alike, or by expert."""


def text_sources(data: str | TextSource | Sequence[str | TextSource]) -> tuple[TextSource, ...]:
    """The sources of text that a recipe's value names."""
    items = [data] if isinstance(data, str | TextSource) else data
    return tuple(TextSource(file=item) if isinstance(item, str) else item for item in items)


class Evaluation(Section):
    """The held-out examples that models are judged by; no byte of a merge depends on them."""

    data: dict[str, TextData] = Field(
        min_length=1, description="Text by task; a task with an expert's name is that expert's own."
    )
    samples: int = Field(100, ge=1, description="The most examples of a task.")
    max_tokens: int = Field(1024, ge=2, description="The most tokens of an example.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description="Of forward passes; left out, bfloat16 where models are stored so and the device is fast at it.",
    )


class Search(Section):
    """How `merger search` looks for values where the recipe is marked with {search: ...}."""

    strategy: Literal["grid", "two-step", "random", "tpe", "cmaes"] = Field(
        "grid", description="How the next values are chosen."
    )
    trials: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="How many merges of a variant are judged; left out, the complete grid."
    )
    objective: str = Field(
        "kept", description="What decides which merge is best: `kept`, `worst`, `mean`, `loss`, or a task."
    )
    samples: int = Field(32, ge=1, description="Examples of a task that trials are judged by; the report uses others.")
    seed: int = Field(0, ge=0, description="Of the strategy's random choices.")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="By a name, the keys of the recipe that this variant sets."
    )


class Calibration(Section):
    """The text that goes through the experts, or the statistics that came out of it earlier."""

    data: TextDataOfAll | None = Field(
        default=None, description="Text of each expert by its name, or one text for all."
    )
    stats: dict[str, Location] = Field(
        default_factory=dict, description="By expert, statistics that `merger calibrate --to` made, in place of text."
    )
    samples: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] = Field(
        100, description="The number of texts of an expert; a map gives each expert its own."
    )
    max_tokens: int = Field(2048, ge=1, description="The most tokens of a text.")
    weighting: Literal["token", "sample"] = Field(
        "token", description="Whether every token counts alike, or every sample however long."
    )
    skip_first_tokens: int = Field(0, ge=0, description="Tokens at the start of a text that are not counted.")
    calib_text: Literal["input", "input+target"] = Field(
        "input", description="Whether the reply of a record goes through the model too."
    )

    def sources(self, expert: str) -> tuple[TextSource, ...]:
        """The sources of an expert's text; none where it has no text."""
        data = self.data.get(expert) if isinstance(self.data, dict) else self.data
        return () if data is None else text_sources(data)

    def samples_of(self, expert: str) -> int:
        """How many samples those of an expert's sources give together that have no count of their own."""
        return self.samples.get(expert, 100) if isinstance(self.samples, dict) else self.samples


def expert_name(name: str) -> str:
    """The name of an expert; ValueError for one that cannot be a file's or a key's."""
    if name == "base" or not _NAME.match(name):
        raise ValueError("an expert's name is letters, digits, _ . -, and not `base`")
    return name


def unused_expert_name(location: str, used_names: Collection[str]) -> str:
    """The name of a folder or repository as that of an expert, numbered if it is among ``used_names``."""
    last = location.partition("@")[0].replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", last).lstrip(".-") or "model"
    stem = "base_model" if stem == "base" else stem
    numbered = (f"{stem}-{i}" for i in range(2, len(used_names) + 3))
    return stem if stem not in used_names else next(name for name in numbered if name not in used_names)


def regular_expression(text: str) -> str:
    """The text, unchanged; ValueError if it is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


_MAY_BE_EMPTY = ("parameters", "rules", "layers", "tokens")


class Choice(Section):
    """A method with its parameters, or a pipeline of stages."""

    method: str | None = Field(default=None, description="A method or a single stage; or else give a pipeline.")
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Those of the method; `merger methods NAME` lists them."
    )
    pipeline: list[str | dict[str, Any]] | None = Field(
        default=None, description="Stages in order: names, or {stage: {parameter: value}}."
    )
    _stages: tuple[Stage, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, value: Any) -> Any:
        """Leaves out keys without a value, as in ``parameters:`` with nothing below, where that means their default."""
        if not isinstance(value, Mapping):
            return value
        return {key: node for key, node in value.items() if node is not None or key not in _MAY_BE_EMPTY}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What was chosen, with validated parameters; a named method is one entry, not yet expanded."""
        return self._stages


class Rule(Choice):
    """What happens to the tensors whose name or kind it matches; the first rule that matches wins."""

    tensors: Annotated[str, AfterValidator(regular_expression)] | None = Field(
        default=None, description="A regular expression that is found anywhere in a tensor's name."
    )
    kinds: list[Kind] | None = Field(default=None, description="Kinds of tensors that the rule is about.")
    use: str | None = Field(default=None, description="`base` or an expert: its tensor is copied, nothing is merged.")

    @model_validator(mode="after")
    def _says_what_it_is_about(self) -> Rule:
        if self.tensors is None and self.kinds is None:
            raise ValueError("expected tensors: (a regular expression) or kinds:, to say what it is about")
        return self

    def matches(self, name: str, kind: str) -> bool:
        """Whether this rule is about the tensor ``name``."""
        name_matches = self.tensors is None or re.search(self.tensors, name) is not None
        return name_matches and (self.kinds is None or kind in self.kinds)
