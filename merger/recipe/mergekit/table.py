"""mergekit's merge methods and the equivalent stages, as of mergekit 0.1.5.

A number stands for a list over depth as well; a parameter of each model is a map by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Values = Mapping[str, Any]
Stages = list[dict[str, dict[str, Any]]]
Base = Literal["input", "first", "origin", "either"]
"""What base_model is: an input like the others, the first of two, where task vectors start, or that if it is given."""
NEEDED: Any = ...
"""Stands for the default of a parameter that has none."""


@dataclass(frozen=True)
class Method:
    """A method's parameters with their defaults, and its equivalent stages."""

    base: Base
    merge_parameters: Values
    model_parameters: Values
    stages: Callable[[Values], Stages]  # ValueError for values that have no equivalent
    idle: Sequence[str] = ()  # what changes nothing in the result
    remark: str = ""  # what is not the same, in a line

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that mergekit looks at."""
        return {*self.merge_parameters, *self.model_parameters}


def share(value: Any) -> Any:
    """Clamps a density to 0 and 1; a list over depth stays as it is."""
    return value if isinstance(value, list) else min(max(value, 0), 1)


def _map_models(values: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {model: change(value) for model, value in values.items()}


def _double(value: Any) -> Any:
    return [2 * item for item in value] if isinstance(value, list) else 2 * value


# --- on the sphere --------------------------------------------------------------------------------


def _scope(p: Values, across: bool) -> str:
    """Returns the scope row or column; mergekit counts rows as stored, merger by output neuron."""
    return "column" if across != p["stored_transposed"] else "row"


def _nuslerp(p: Values) -> Stages:
    scope = "tensor" if p["nuslerp_flatten"] else _scope(p, p["nuslerp_row_wise"])
    return [{"nuslerp": {"weight": p["weight"], "space": p["space"], "scope": scope}}]


def _multislerp(p: Values) -> Stages:
    if isinstance(p["eps"], list) or p["eps"] > 1e-6:  # less is not seen in float32
        raise ValueError(f"has no equivalent with eps: {p['eps']}, which shortens every direction; leave it out")
    return [{"multislerp": {"weight": p["weight"], "space": p["space"], "normalize": p["normalize_weights"]}}]


# --- task arithmetic, generalised: sparsify, rescale, weigh, elect, divide, scale -----------------


def _top(p: Values) -> Stages:
    return [{"top": {"density": _map_models(p["density"], share), "at_least": 1}}]


def _middle(p: Values) -> Stages:
    return [{"middle": {"density": _map_models(p["density"], share), "drop_high": p["gamma"]}}]


def _random(p: Values) -> Stages:
    return [{"random": {"density": _map_models(p["density"], share), "rescale": "none"}}]


def _magprune(p: Values) -> Stages:
    density = _map_models(p["density"], share)
    width = {model: 0 if density[model] in (0, 1) else _double(value) for model, value in p["epsilon"].items()}
    return [{"magprune": {"density": density, "epsilon": width, "rank_norm": "n-1", "rescale": "none"}}]


def _check_no_negative(weights: Mapping[str, Any]) -> None:
    if any(item < 0 for weight in weights.values() for item in (weight if isinstance(weight, list) else [weight])):
        raise ValueError(
            "has no equivalent with a negative weight: mergekit elects by the signs of weighted changes, merger by the "
            "changes' own"
        )


def _generalised_arithmetic(
    sparsify: Callable[[Values], Stages] | None,
    *,
    elect: bool,
    normalize: bool,
    rescale: bool,
    extra_parameters: Values | None = None,
    remark: str = "",
) -> Method:
    def stages(p: Values) -> Stages:
        is_dense = sparsify is None or all(density == 1 for density in p["density"].values())
        thinned = [] if sparsify is None or is_dense else sparsify(p)
        rescaled: Stages = [{"rescale": {"by": "l1"}}] if thinned and p["rescale"] else []
        if elect:
            _check_no_negative(p["weight"])
            operation = "mean" if p["normalize"] else "sum"
            merged: Stages = [{"sign_elect": {"weight": p["weight"], "merge": operation, "zero_sign": "positive"}}]
        else:
            merged = [{"mean" if p["normalize"] else "sum": {"weight": p["weight"]}}]
        scaled: Stages = [] if p["lambda"] == 1 else [{"scale": {"lambda": p["lambda"]}}]
        return [*thinned, *rescaled, *merged, *scaled]

    merge_parameters = {"normalize": normalize, "rescale": rescale, "lambda": 1}
    model_parameters = {"weight": NEEDED, "density": 1, **(extra_parameters or {})}
    return Method("origin", merge_parameters, model_parameters, stages, idle=("int8_mask",), remark=remark)


_DRAWN = "draws other random numbers than mergekit does"
_BY_ROW = f"{_DRAWN}, and ranks the rows of GPT-2's Conv1D by output neuron, where mergekit ranks them as stored"

# --- the table ------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "linear": Method(
        "input", {"normalize": True}, {"weight": NEEDED},
        lambda p: [{"linear": {"weight": p["weight"], "normalize": p["normalize"]}}],
    ),
    "passthrough": Method(
        "input", {}, {"scale": 1},
        lambda p: [{"linear": {"weight": p["scale"], "normalize": False}}],
    ),
    "slerp": Method(
        "first", {"t": NEEDED}, {},
        lambda p: [{"slerp": {"t": p["t"], "space": "weights"}}],
    ),
    "nuslerp": Method("either", {"nuslerp_flatten": True, "nuslerp_row_wise": False}, {"weight": NEEDED}, _nuslerp),
    "multislerp": Method("either", {"normalize_weights": True, "eps": 1e-8}, {"weight": NEEDED}, _multislerp),
    "karcher": Method(
        "input", {"max_iter": 10, "tol": 1e-5}, {},
        lambda p: [{"karcher": {"space": "weights", "max_iter": p["max_iter"], "tol": p["tol"]}}],
    ),
    "task_arithmetic": _generalised_arithmetic(None, elect=False, normalize=False, rescale=False),
    "ties": _generalised_arithmetic(_top, elect=True, normalize=True, rescale=False),
    "dare_linear": _generalised_arithmetic(_random, elect=False, normalize=False, rescale=True, remark=_DRAWN),
    "dare_ties": _generalised_arithmetic(_random, elect=True, normalize=False, rescale=True, remark=_DRAWN),
    "della_linear": _generalised_arithmetic(
        _magprune, elect=False, normalize=False, rescale=True, extra_parameters={"epsilon": 0.15},
        remark=_BY_ROW,
    ),
    "della": _generalised_arithmetic(
        _magprune, elect=True, normalize=True, rescale=True, extra_parameters={"epsilon": 0.15},
        remark=_BY_ROW,
    ),
    "breadcrumbs": _generalised_arithmetic(
        _middle, elect=False, normalize=False, rescale=False, extra_parameters={"gamma": 0.01},
    ),
    "breadcrumbs_ties": _generalised_arithmetic(
        _middle, elect=True, normalize=False, rescale=False, extra_parameters={"gamma": 0.01},
    ),
    "sce": Method(
        "origin", {"select_topk": 1}, {},
        lambda p: [{"sce": {"select_topk": share(p["select_topk"]), "even_below": 1e-6}}],
        idle=("int8_mask",),
    ),
    "model_stock": Method(
        "origin", {"filter_wise": False}, {},
        lambda p: [{"model_stock": {"scope": _scope(p, False) if p["filter_wise"] else "tensor"}}],
    ),
    "nearswap": Method("origin", {"t": NEEDED}, {}, lambda p: [{"nearswap": {"t": p["t"]}}]),
    "ram": Method("origin", {"epsilon": 1e-5}, {}, lambda p: [{"ram": {"epsilon": p["epsilon"]}}]),
    "ramplus_tl": Method(
        "origin", {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}, {},
        lambda p: [{"ram": {"epsilon": p["epsilon"], "r": p["r"], "alpha": p["alpha"]}}],
    ),
    "arcee_fusion": Method(
        "origin", {}, {}, lambda p: [{"arcee_fusion": {}}],
        remark="finds quartiles exactly, and divergences in float64, where mergekit samples and rounds",
    ),
}  # fmt: skip
