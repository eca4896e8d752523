"""The registry: a decorator per kind of function, and what can be read off a signature.

What stands before the ``*`` is supplied by the runner, by name:

    deltas         [k r c]  what earlier stages left of each expert's task vector; [r c] after the merger
    originals      [k r c]  the task vectors before the first stage
    base           [r c]    the base weights, float32
    scores         [k r c]  the score named by the stage's own parameter ``score``
    inside         a flow that merges task vectors [k r' c'], in any directions, by the method that a parameter names
    uniform        draws: ``uniform(purpose, double=False)`` -> [k r c] in [0, 1), keyed by tensor and expert
    second_moment  [k 1 c]  E[x_j^2] of each expert's input to this matrix, or None where it has none
    mean_input     [k 1 c]  E[x_j], or None likewise
    gram           [k c c]  E[x x^T] likewise, made for this matrix and dropped after it
    reached        [k 1 1]  whether any token came to this matrix (its moments are all 1 where not), or None likewise
    token_share    [k r 1]  how often each row of an embedding is looked up, or None elsewhere
    fisher         [k r c]  the diagonal Fisher information of each expert's weights, or None where it has none
    learned        [r c]    the weights that were learned with the block, or None where they were not
    coefficients   [k r c]  what was learned of each task vector's elements, or [k r 1], [k 1 1]; None likewise
    model_coefficients, merged_gram, draft_gram and cross_moment are inputs too, which `inputs` of a decorator gives to
                            arguments of other names (adamerging.py, regmean.py)
    kind           str      linear, conv1d, head, tied, embedding, vector, expert3d or other
    experts        tuple    the experts' names

On the CPU deltas, base, scores and draws may be expressions that act as tensors do (kernels/lazy.py): none of them may
be changed in place.

What stands after it is the recipe's schema: annotation, default, bounds. A trailing underscore is
dropped from a name (``lambda_`` is written ``lambda``).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    create_model,
)

from merger.errors import BrokenMethodWarning, nearest
from merger.pipeline.inputs import SLICE_SUPPLIES

Kind = Literal["score", "sparsifier", "merger", "pack", "filter", "scale", "method"]
Takes = Literal["slice", "rows", "runs", "matrix"]
"""The least that a stage must see at once: any slice; rows, one for each output neuron; a run of more rows than there
are columns, or all rows; the whole oriented matrix."""
F = TypeVar("F", bound=Callable[..., Any])
Stage = partial[Any]
"""A registered function with the parameters of one recipe."""
if TYPE_CHECKING:
    from torch import Tensor

    class Draw(Protocol):
        """Draws one uniform for every position of the slice, from a stream named for this purpose."""

        def __call__(self, purpose: str, *, double: bool = False) -> Tensor:
            """Returns the draws [k r c]."""


def _by_scope(*, scope: str = "tensor", **_: object) -> Takes:
    return "rows" if scope == "row" else "slice"


def _unremarkable(experts: int, **_: object) -> str:
    return ""


def _nothing(kind: str, **_: object) -> None:
    return None


def _no_claims(**_: object) -> Sequence[Fraction]:
    return ()


@dataclass(frozen=True)
class Form:
    """How one named result of a pack is stored: once for every expert, or `shared` by all.

    weights  [r c]     a task vector; the base plus it is stored, in the output's dtype
    bits     [r c]     booleans, eight to a byte
    chosen   [r c]     of which only the `count` elements where the bits named `at` are set are stored, likewise
    floats   `shape`   float32; the same for every slice of a matrix
    factors  `shape`   the same, in the output's dtype
    """

    holds: Literal["weights", "bits", "chosen", "floats", "factors"]
    shared: bool = False
    shape: tuple[int, ...] = ()
    at: str = ""
    count: int = 0


@dataclass(frozen=True)
class Packing:
    """What belongs to a pack beside its function."""

    forms: Callable[..., dict[str, Form]]
    """Of a matrix's `rows` and `columns` and the parameters: how each result is stored."""
    unpack: Callable[..., Tensor]
    """Of one expert's results, by name: its task vector [r c] again."""


class Package(NamedTuple):
    """An installed package, other than merger, that methods come from."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PACKAGES: dict[str, Package] = {}
"""The packages with methods, by the module that their entry point names; it and the modules below hold the methods."""


@dataclass(frozen=True)
class Entry:
    """One registered function."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    takes: Callable[..., Takes] = _by_scope  # the least it must see at once, given its parameters
    align: str | None = None  # the parameter whose multiple every slice must begin at
    experts: int | None = None  # how many experts it merges, where that is fixed
    fewest: int = 1  # how many it merges at least
    scope: str = "tensor"  # what a score is ranked within, unless the recipe says it
    inputs: Callable[..., Mapping[str, str]] | None = None  # by argument, given its parameters; see `input_names`
    check: Callable[..., None] | None = None  # raises ValueError for parameters that exclude each other
    remark: Callable[..., str] = _unremarkable  # what a plan notes of its parameters for so many experts
    claims: Callable[..., Sequence[Fraction]] = _no_claims  # each expert's share of a tensor, changed by it or not
    elsewhere: Callable[..., list[Stage] | None] = _nothing  # what takes its place, given the kind and parameters
    packing: Packing | None = None  # of a pack
    exact: bool = True  # whether every device gives the same bits: it sums no floats, and decomposes no matrix

    def input_names(self, **values: Any) -> Mapping[str, str]:
        """The inputs that it takes for these parameters, by argument; by default an argument takes that of its name."""
        if self.inputs is not None:
            return self.inputs(**values)
        return {name: name for name in supplied(self.function) if name not in SLICE_SUPPLIES}

    @property
    def root(self) -> str | None:
        """The module among `PACKAGES` that the function's module is, or is below; None for a method of merger."""
        module = self.function.__module__
        while module and module not in PACKAGES:
            module = module.rpartition(".")[0]
        return module or None

    @property
    def package(self) -> Package | None:
        """The installed package that it comes from; None for a method of merger."""
        return None if self.root is None else PACKAGES[self.root]

    @property
    def summary(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def paper(self) -> str:
        """The first link in the method's file, which is the paper's."""
        text = inspect.getdoc(inspect.getmodule(self.function)) or ""
        return next((word.strip("().,;") for word in text.split() if word.startswith("https://")), "")


ENTRIES: dict[str, Entry] = {}
"""Stages and named methods."""
SCORES: dict[str, Entry] = {}
"""Scores. Each is also a stage of its own: `obm: {density: 0.3}` keeps the top of that score."""


def _register(kind: Kind, table: dict[str, Entry], **traits: Any) -> Callable[[F], F]:
    def keep(function: F) -> F:
        name = function.__name__.rstrip("_")
        if (rival := table.get(name)) is not None:
            _check_rival(function, rival)
        table[name] = Entry(name, kind, function, **traits)
        return function

    return keep


def _check_rival(function: Callable[..., Any], rival: Entry) -> None:
    """Decides which of two files registers a name: in one folder, the file of that name.

    Warns that the rival is left out. Raises ValueError if this file has another name or another folder. A cell of a
    notebook that is run again replaces its own method.
    """
    folder, _, file = function.__module__.rpartition(".")
    rival_module = rival.function.__module__
    if function.__module__ == rival_module == "__main__":
        return
    if file != rival.name or rival_module.rpartition(".")[0] != folder:
        origin = rival_module if rival.package is None else f"{rival_module} of {rival.package}"
        raise ValueError(f"there is another {rival.name} in {origin}; give this one another name")
    warnings.warn(
        f"{rival.function.__code__.co_filename}: its {rival.name} is left out, "
        f"for {function.__module__} is the file of that name",
        BrokenMethodWarning,
        stacklevel=2,
    )


def score(**traits: Any) -> Callable[[F], F]:
    """Registers a score: ``deltas`` [k r c] -> [k r c], the larger in size the more worth keeping."""
    return _register("score", SCORES, **traits)


def sparsifier(**traits: Any) -> Callable[[F], F]:
    """Registers a stage k -> k that thins each expert's task vector."""
    return _register("sparsifier", ENTRIES, **traits)


def merger(**traits: Any) -> Callable[[F], F]:
    """Registers a stage k -> 1 that makes one task vector [r c] of all."""
    return _register("merger", ENTRIES, **traits)


def pack(*, forms: Callable[..., dict[str, Form]], unpack: Callable[..., Tensor], **traits: Any) -> Callable[[F], F]:
    """Registers a last stage that makes more than one model: k task vectors -> named results, of which each is rebuilt.

    The function gives {name: [k ...]}, or {name: [...]} of what all share; ``forms`` says how these are stored, from
    the sizes of a matrix alone; ``unpack`` takes one expert's by their names and gives its task vector [r c].
    """
    return _register("pack", ENTRIES, packing=Packing(forms, unpack), **traits)


def filter_(**traits: Any) -> Callable[[F], F]:
    """Registers a stage 1 -> 1 that changes what was merged [r c], such as by the ``originals``."""
    return _register("filter", ENTRIES, **traits)


def scale(**traits: Any) -> Callable[[F], F]:
    """Registers a stage that multiplies whatever it is given, before a merger or after it."""
    return _register("scale", ENTRIES, **traits)


def method(**traits: Any) -> Callable[[F], F]:
    """Registers a named method: its parameters in, a short list of stages out."""
    return _register("method", ENTRIES, **traits)


@cache
def parameters(function: Callable[..., Any]) -> Mapping[str, tuple[Any, Any]]:
    """The recipe's side of a signature: name as written -> (annotation, default)."""
    annotations = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            annotations[name] = (_annotation(parameter, function), default)
    return MappingProxyType(annotations)


def _annotation(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """Returns the type of a parameter, also in a file with ``from __future__ import annotations``."""
    if parameter.annotation is parameter.empty:
        raise TypeError(f"{parameter.name} of {function.__name__} has no type, such as float")
    annotation = parameter.annotation
    return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation


@cache
def supplied(function: Callable[..., Any]) -> tuple[str, ...]:
    """The runner's side of a signature: the names before the ``*``."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)


@cache
def schema(entry: Entry) -> type[BaseModel]:
    """A strict model of the entry's parameters, under the names a recipe writes."""
    fields: dict[str, Any] = {
        name: (kind, Field(default, alias=name.rstrip("_"), validate_default=default is not ...))
        for name, (kind, default) in parameters(entry.function).items()
    }
    config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    return create_model(entry.name, __config__=config, __doc__=entry.summary, **fields)


def checked(name: str, parameters: Mapping[str, Any]) -> Stage:
    """The stage or method ``name`` with validated parameters; pydantic's errors pass through.

    A score's name stands for `top` with that score, and takes the parameters of both.
    """
    if name in ENTRIES:
        return _bound(ENTRIES[name], parameters)
    score_parameters = {key: value for key, value in parameters.items() if key in _names(SCORES[name])}
    top_parameters = {key: value for key, value in parameters.items() if key not in score_parameters}
    return _bound(
        ENTRIES["top"], {"scope": SCORES[name].scope, **top_parameters, "score": _bound(SCORES[name], score_parameters)}
    )


def _names(entry: Entry) -> set[str]:
    return {name.rstrip("_") for name in parameters(entry.function)}


def parameter_names(name: str) -> set[str]:
    """All parameters that the stage, method or score ``name`` takes in a recipe."""
    if name in ENTRIES:
        return _names(ENTRIES[name])
    return _names(SCORES[name]) | _names(ENTRIES["top"]) - {"score"}


def annotations_of(name: str) -> dict[str, Any]:
    """The types of all parameters that the stage, method or score ``name`` takes in a recipe, by name."""
    entries = [ENTRIES[name]] if name in ENTRIES else [ENTRIES["top"], SCORES[name]]
    annotations = {
        parameter.rstrip("_"): annotation
        for entry in entries
        for parameter, (annotation, _) in parameters(entry.function).items()
    }
    return {key: annotations[key] for key in parameter_names(name)}


def _bound(entry: Entry, parameters: Mapping[str, Any]) -> Stage:
    model = schema(entry)(**parameters)
    return partial(entry.function, **{field: getattr(model, field) for field in type(model).model_fields})


def stage(function: Callable[..., Any], **arguments: Any) -> Stage:
    """A stage of a named method: ``function`` with ``arguments`` parameters and its defaults for the rest."""
    return _bound(entry_of(function), {name.rstrip("_"): value for name, value in arguments.items()})


def _choice(value: Any, table: Mapping[str, Entry], kind: str) -> tuple[Entry, Any]:
    """The entry that is written as its name, or as {name: {parameter: value}}, and its parameters."""
    by_name = {value: {}} if isinstance(value, str) else value
    if not isinstance(by_name, Mapping) or len(by_name) != 1:
        raise ValueError(f"expected a {kind}'s name, or {{name: {{parameter: value}}}}")
    ((name, parameters),) = by_name.items()
    if name not in table:
        raise ValueError(f"there is no {kind} {name!r}; {nearest(str(name), table)}")
    return table[name], parameters


def _score(value: Any) -> Stage:
    """A score, written as `_choice` reads it."""
    return value if isinstance(value, partial) else _bound(*_choice(value, SCORES, "score"))


def written(stage: Stage) -> dict[str, Any]:
    """The stage as a recipe writes it, every parameter spelled out: {name: {parameter: value}}."""
    entry = entry_of(stage.func)
    model = schema(entry).model_construct(**stage.keywords)
    return {entry.name: model.model_dump(mode="json", by_alias=True)}


def stage_names(stages: Iterable[Stage]) -> str:
    """The names of stages with + between them."""
    return "+".join(entry_of(stage.func).name for stage in stages)


Score = Annotated[
    Any, BeforeValidator(_score), PlainSerializer(written), WithJsonSchema({"type": ["string", "object"]})
]
"""A parameter that names one of the registered scores."""


def _method(value: Any) -> Stage:
    """A method, written as `_choice` reads it; it ranks one tensor, unless told otherwise."""
    if isinstance(value, partial):
        return value
    methods = {name: entry for name, entry in ENTRIES.items() if entry.kind in ("method", "merger")}
    entry, parameters = _choice(value, methods, "method")
    defaults = {"scope": "tensor"} if "scope" in _names(entry) else {}
    return _bound(entry, {**defaults, **(parameters or {})})


@dataclass(frozen=True)
class Nested:
    """Marks a parameter that names a method which runs inside another."""

    turned: bool  # whether on a whole matrix of task vectors, in other directions than the base's
    has_features: bool = True  # whether its columns are the matrix's in-features, of which statistics can be taken


Inner = Annotated[
    Any,
    BeforeValidator(_method),
    PlainSerializer(written),
    WithJsonSchema({"type": ["string", "object"]}),
    Nested(turned=True),
]
"""A parameter that names a method, which merges task vectors that were turned to other directions."""
CoreInner = Annotated[
    Any,
    BeforeValidator(_method),
    PlainSerializer(written),
    WithJsonSchema({"type": ["string", "object"]}),
    Nested(turned=True, has_features=False),
]
"""A parameter that names a method, which merges task vectors that were turned on both sides."""
Anchor = Annotated[
    Any,
    BeforeValidator(_method),
    PlainSerializer(written),
    WithJsonSchema({"type": ["string", "object"]}),
    Nested(turned=False),
]
"""A parameter that names a method, whose result is what another one starts from."""


def nested_parameter(function: Callable[..., Any]) -> tuple[str, Nested] | None:
    """The parameter of a function that names a method which runs inside it, and how that runs."""
    for name, (annotation, _) in parameters(function).items():
        for mark in getattr(annotation, "__metadata__", ()):
            if isinstance(mark, Nested):
                return name, mark
    return None


@cache
def entry_of(function: Callable[..., Any]) -> Entry:
    """The entry of a registered function."""
    return next(e for table in (ENTRIES, SCORES) for e in table.values() if e.function is function)
