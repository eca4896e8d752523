"""A merger.json that was damaged: every command ends in a sentence, which names the damaged part."""

import copy
import json

import pytest
import torch
from checkpoints import save, trio

from merger.engine.manifest import Manifest
from merger.engine.merge import merge
from merger.recipe.recipe import Recipe

RECIPE = {
    "base": "base",
    "experts": {"code": "code", "math": {"model": "math", "weight": "1/3"}},
    "rules": [{"tensors": r"norm\.weight", "use": "base"}],
    "output": {"path": "out"},
}
VALUES = (None, True, -1, 7, 0.5, "", "text", [], [None], ["text"], {}, {"text": None}, {"text": "text"})


@pytest.fixture(params=["ties", "tall_masks"])
def method(request):
    """One that makes a model, and one that packs several experts."""
    return request.param


@pytest.fixture
def manifest(method, tmp_path, monkeypatch):
    """The file of a finished merge, with its inputs beside it; the current folder is around both."""
    monkeypatch.chdir(tmp_path)
    trio(tmp_path, layers=1)
    merge(Recipe.parse({**RECIPE, "method": method}, tmp_path))
    return tmp_path / "out" / "merger.json"


def places(value, path=()):
    """The keys on the way to everything in a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


def around(content, path):
    for key in path[:-1]:
        content = content[key]
    return content


def mutants(content):
    """All contents that lack one part or have a part of another type, each with the keys of that part."""
    for path in places(content):
        changed = copy.deepcopy(content)
        original = around(changed, path).pop(path[-1])
        yield path, changed
        for value in VALUES:
            if type(value) is not type(original):
                changed = copy.deepcopy(content)
                around(changed, path)[path[-1]] = value
                yield path, changed


def refusal(content):
    """The sentence by which a manifest is refused; None if it is accepted."""
    try:
        Manifest.parse(json.dumps(content).encode())
    except ValueError as error:
        return str(error)
    return None


def test_whatever_is_damaged_is_named_in_one_sentence(manifest):
    content = json.loads(manifest.read_bytes())
    assert refusal(content) is None
    refused = 0
    for path, changed in mutants(content):
        sentence = refusal(changed)
        if sentence is not None:
            assert sentence.endswith("; merge again")
            assert "\n" not in sentence
            assert any(name in sentence for name in {str(path[0]), "inputs", "format"}), (path, sentence)
            refused += 1
    assert refused > 500


def is_free(path):
    """Whether a part is text for people, or a part of the recipe that only merging again reads."""
    return path[0] in ("notes", "versions", "dropped") or path[:2] == ("recipe", "parameters")


def test_what_is_accepted_stops_no_command(method, manifest, merger):
    packed = method == "tall_masks"
    commands = [("verify", "out", "--deep"), ("inspect", "out")]
    commands[0] = ("extract", "out", "code", "--output", "extracted", "--force") if packed else commands[0]
    kinds = set()
    for path, changed in mutants(json.loads(manifest.read_bytes())):
        kind = tuple(
            "*" if place and path[place - 1] in ("tensors", "inputs", "experts") else key
            for place, key in enumerate(path)
        )
        if kind in kinds or is_free(path) or refusal(changed) is not None:
            continue
        kinds.add(kind)
        manifest.write_text(json.dumps(changed))
        for command in commands:
            ran = merger(*command)
            assert ran.code in (0, 2, 3, 5), (path, command)
            assert all(line.startswith(("error: ", "note: ")) for line in ran.err.splitlines()), (path, command)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda content: content["recipe"].pop("experts"), "lacks recipe.experts"),
        (lambda content: content["recipe"].pop("output"), "lacks recipe.output"),
        (lambda content: content["recipe"]["output"].pop("path"), "lacks recipe.output.path"),
        (lambda content: content["recipe"].update(rules=5), "recipe.rules is not as a merge writes it"),
        (lambda content: content["inputs"]["code"].pop("files"), "lacks inputs.code.files"),
        (lambda content: content["inputs"].pop("code"), "inputs is not as a merge writes it"),
        (lambda content: content.pop("device"), "lacks device"),
    ],
)
@pytest.mark.parametrize("method", ["tall_masks"])
def test_every_command_that_reads_it_says_so(manifest, merger, damage, sentence):
    content = json.loads(manifest.read_bytes())
    damage(content)
    manifest.write_text(json.dumps(content))
    for command, code in (
        (("verify", "out"), 5),
        (("verify", "out", "--deep"), 5),
        (("inspect", "out"), 3),
        (("extract", "out", "code", "--output", "extracted"), 3),
        (("push", "out", "org/name"), 5),
        (("eval", "out", "--data", "code=code.jsonl"), 3),
    ):
        ran = merger(*command)
        assert ran.code == code, command
        assert f"merger.json: {sentence}; merge again\n" in ran.err, command


def test_a_merge_that_left_a_tensor_out_is_read_again(tmp_path):
    models = trio(tmp_path)
    save(tmp_path / "math", {**models["math"], "model.extra.weight": torch.ones(2)})
    rules = [{"tensors": "extra", "use": "base"}]
    experts = {"code": "code", "math": "math"}
    recipe = {"base": "base", "experts": experts, "method": "linear", "rules": rules, "output": "out"}
    merge(Recipe.parse(recipe, tmp_path))
    reason = "rule 1 keeps the base, which has none"
    assert Manifest.read(tmp_path / "out").content["dropped"] == {"math": {"model.extra.weight": reason}}
