"""What an inspection is about and what its figures say, in sentences that name the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations

from merger._display import name_list
from merger.inspection.report import Facts, Inspection, Merged, View

Layers = Mapping[str, Facts | Merged]


def opening(inspection: Inspection) -> str:
    """What is merged, how, and into what; or what is compared with what."""
    merge = inspection.merge
    if merge is None:
        return f"{name_list(inspection.experts)} compared with its base {inspection.base}."
    rules = "" if not merge.rules else f", with {_count(merge.rules, 'rule')} for some tensors,"
    verb = "merged" if inspection.subject == "merge" else "would merge"
    if not inspection.experts:
        return f"{merge.method}{rules} {verb} {merge.inputs['base']} alone, into {merge.output}."
    experts = name_list([f"{name} ({merge.inputs[name]})" for name in inspection.experts])
    fine_tunes = "a fine-tune" if len(inspection.experts) == 1 else "fine-tunes"
    return f"{merge.method}{rules} {verb} {experts}, {fine_tunes} of {merge.inputs['base']}, into {merge.output}."


def findings(inspection: Inspection) -> list[str]:
    """Where the experts overlap, where they conflict, and what of each is in the merge, as far as there are figures."""
    return [*_of_experts(inspection), *_of_result(inspection)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share as 12.3 %."""
    return f"{100 * share:.1f} %"


# --- the experts ------------------------------------------------------------------------------------


def _of_experts(inspection: Inspection) -> Iterator[str]:
    """Sentences on what the recipe's own mergers take, after the stages before them."""
    view = next(iter(inspection.merging()), None)
    if view is None:
        return
    after = "" if view.name == "task_vectors" else f"After {view.name}, "
    names = list(view.whole.density)
    if len(names) < 2:
        yield from (_capital(f"{after}{_density(view, name)}") for name in names)
        return
    yield _capital(f"{after}{_overlap(view)}")
    yield _capital(f"{after}{_conflict(view)}")


def _capital(sentence: str) -> str:
    """The sentence with a capital, unless it begins with the name of an expert."""
    return sentence[0].upper() + sentence[1:] if sentence.startswith(("the ", "no ")) else sentence


def _density(view: View, expert: str) -> str:
    share = view.whole.density[expert]
    where = _extreme(view.layers, lambda values: values.density[expert], max)
    least = _extreme(view.layers, lambda values: values.density[expert], min)
    sentence = f"{expert} changes {percent(share)} of all weights"
    return f"{sentence}: most in {where}, least in {least}." if where and least else f"{sentence}."


def _overlap(view: View) -> str:
    rates = view.whole.overlap
    a, b = max(permutations(rates, 2), key=lambda pair: rates[pair[0]][pair[1]])
    if rates[a][b] == 0:
        return "no weight is changed by two experts."
    where = _extreme(view.layers, lambda values: values.overlap[a][b], max)
    return (
        f"the experts overlap most in {a} and {b}: {percent(rates[a][b])} of the weights that {a} changes, {b} changes "
        f"too; random positions would share {percent(view.whole.density[b])}{_most(where)}."
    )


def _conflict(view: View) -> str:
    rates, overlap = view.whole.sign_conflict, view.whole.overlap
    pairs = [(a, b) for a, b in permutations(rates, 2) if overlap[a][b] > 0]
    if not pairs:
        return "no weight is pulled in opposite directions, since no two experts change the same."
    a, b = max(pairs, key=lambda pair: rates[pair[0]][pair[1]])
    if rates[a][b] == 0:
        return "no two experts pull a weight in opposite directions."
    where = _extreme(view.layers, lambda values: values.sign_conflict[a][b], max)
    return (
        f"the experts conflict most in {a} and {b}: they pull {percent(rates[a][b])} of the weights that both change "
        f"in opposite directions; random signs would pull 50 %{_most(where)}."
    )


def _most(where: str) -> str:
    return f". Most in {where}" if where else ""


def _extreme(layers: Layers, value: Callable[[Facts | Merged], float], choose: Callable[..., str]) -> str:
    """The layer with the greatest or least share and that share; nothing where all layers have the same.

    Layers with less than a hundredth of the largest one's weights do not count: a norm by itself says little.
    """
    limit = max(values.elements for values in layers.values()) / 100
    shares = {name: value(values) for name, values in layers.items() if values.elements >= limit}
    if len({percent(share) for share in shares.values()}) < 2:
        return ""
    name = choose(shares, key=lambda layer: shares[layer])
    return f"{name} ({percent(shares[name])})"


# --- the result -------------------------------------------------------------------------------------


def _of_result(inspection: Inspection) -> Iterator[str]:
    """A sentence on the share of the merge that each input gave, or where values are mixed, on its direction."""
    view = next((view for view in inspection.views if view.name == "result"), None)
    if view is None:
        return
    whole = view.whole
    if whole.blend <= 0.5:
        experts = ", ".join(f"{name} {percent(share)}" for name, share in whole.at_expert.items())
        yield (
            f"Of all weights the merge takes the exact values of {experts}, and of the base {percent(whole.at_base)}; "
            f"{percent(whole.blend)} are at no single input's value."
        )
        return
    cosines = sorted(whole.cosine.items(), key=lambda item: -item[1])
    directions = ", ".join(f"{name} {cosine:+.3f}" for name, cosine in cosines)
    yield (
        f"The merge mixes the inputs in {percent(whole.blend)} of all weights; the cosines of its change with the "
        f"experts' are: {directions}."
    )
