"""What README and docs show is true: commands, recipes, code, tables, links."""

import ast
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tomllib

import click
import pytest
import typer
import yaml
from checkpoints import llama, save
from markdown import ROOT, Block, assert_shown, blocks, commands
from safetensors.torch import save_file

import merger.methods
from merger import Recipe, RunOptions, errors, plan
from merger.cli import app
from merger.cli._report import methods_json
from merger.evaluation.search.space import example, spaces
from merger.pipeline.registry import ENTRIES, SCORES
from merger.recipe.document import Document
from merger.recipe.recipe import search_of
from merger.recipe.recommendations import QUICK, RECOMMENDATIONS, TEXT, WEIGHTS

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"{path.relative_to(ROOT)}" for path in ROOT.glob("docs/**/*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

TUTORIAL = ("median", "equal_norms", "saliency_mean", "shrunk_mean")
"""The methods that docs/adding-a-method.md writes."""

every_page = pytest.mark.parametrize("page", PAGES)


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


# --- commands -------------------------------------------------------------------------------------


def parse(arguments):
    """Parses a command line of `merger` without running it; click's errors pass through."""
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="merger")
    name, command, rest = group.resolve_command(context, list(arguments))
    return command.make_context(name, list(rest), parent=context)


def inline_commands(page):
    """The commands of `merger` in the running text of a page, as lists of words."""
    prose = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)
    return [span.split()[1:] for span in re.findall(r"`(merger [^`]+)`", prose)]


@every_page
def test_every_command_of_a_console_is_one_with_those_flags(page):
    for block in blocks(page, "console"):
        for command, _ in commands(block):
            if command[0] == "merger":
                parse(itertools.takewhile(lambda word: word not in ("|", ">"), command[1:]))


@every_page
def test_every_command_in_the_text_is_one_with_those_flags(page):
    group = typer.main.get_command(app)
    for name, *words in inline_commands(page):
        options = group.params if name.startswith("-") else group.commands[name].params
        flags = {flag for parameter in options for flag in (*parameter.opts, *parameter.secondary_opts)}
        used_flags = {word.partition("=")[0] for word in (name, *words) if re.match(r"--?[a-z]", word)}
        assert used_flags <= flags, (name, used_flags - flags)


@every_page
def test_every_file_that_is_shown_is_there(page):
    page_commands = [command for block in blocks(page, "console") for command, _ in commands(block)]
    files = {word for command in page_commands for word in command if command[0] in ("bash", "python") and "/" in word}
    files |= set(re.findall(r"`(?:python |bash )?((?:scripts|tests|merger|recipes|docs)/[\w./-]+\.\w+)", text(page)))
    to_be_written = {f"merger/methods/{name}.py" for name in TUTORIAL}
    missing = {file for file in files if not (ROOT / file).is_file() and "NAME" not in file}
    assert missing <= to_be_written


@every_page
def test_every_extra_that_is_shown_can_be_installed(page):
    assert set(re.findall(r"merger\[([\w-]+)\]", text(page))) <= PROJECT["optional-dependencies"].keys()


@every_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), target


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- recipes --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The models, the adapter and the texts that README's recipes name, small; the current folder."""
    for seed, name in enumerate(("base", "code", "french")):
        save(tmp_path / "models" / name, llama(seed))
    adapter = tmp_path / "adapters" / "chat"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]})
    )
    tensors = llama(5)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    column = tensors["model.layers.0.self_attn.q_proj.weight"][:, :1]
    save_file(
        {f"{key}.lora_A.weight": column.T.contiguous(), f"{key}.lora_B.weight": column.contiguous()},
        adapter / "adapter_model.safetensors",
    )
    for expert in ("code", "french", "chat"):
        (tmp_path / f"{expert}.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def first_recipe():
    """README's first recipe, with the base in a folder."""
    return blocks("README.md", "yaml")[0].text.replace(BASE, "models/base")


def planned(recipe):
    merge_plan = plan(recipe)
    merge_plan.close()
    return merge_plan


def test_the_first_recipe_of_the_readme_plans_and_merges(folder, merger):
    (folder / "recipe.yaml").write_text(first_recipe())
    assert merger("plan", "recipe.yaml").code == 0
    assert merger("run", "recipe.yaml").code == 0
    assert merger("verify", "out/merged").code == 0


def test_the_pipeline_of_the_reference_plans(folder):
    (pipeline,) = blocks("docs/recipe-reference.md", "yaml")
    recipe, fragment = (yaml.safe_load(first_recipe()), yaml.safe_load(pipeline.text))
    recipe = {key: value for key, value in recipe.items() if key not in ("method", "parameters")} | fragment
    recipe["calibration"] = {"data": {expert: f"{expert}.jsonl" for expert in recipe["experts"]}}
    stages = {
        tensor.name: [stage.entry.name for stage in tensor.stages]
        for tensor in planned(Recipe.parse(recipe, folder)).tensors
    }
    assert stages["model.layers.0.mlp.up_proj.weight"] == ["bs", "sign_elect", "scale"]
    assert (stages["lm_head.weight"], stages["model.norm.weight"]) == (["linear"], [])


FRAGMENTS = [
    pytest.param(block, id=f"{page}:{block.line}")
    for page in PAGES
    if page not in ("README.md", "docs/adding-a-method.md", "docs/ci.md", "docs/recipe-reference.md")
    for block in blocks(page, "yaml")
]


@pytest.mark.parametrize("block", FRAGMENTS)
def test_a_part_of_a_recipe_in_the_docs_is_valid(block: Block, tmp_path):
    fragment = yaml.safe_load(block.text)
    (tmp_path / "ckpts" / "step-1").mkdir(parents=True)
    calibration = fragment.get("calibration", {})
    experts = [*calibration.get("data", {}), *calibration.get("stats", {})] or ["code", "math"]
    recipe = {
        "base": "base",
        "experts": dict.fromkeys(experts, "expert"),
        "method": "obim" if calibration else "ties",
        "output": {"path": "out"},
        **fragment,
    }
    document = Document("recipe.yaml", tmp_path, recipe)
    if "search" in recipe:
        search_of(document)
        example(spaces(document, {}, ())[""])
    else:
        Recipe.of(document)


def test_a_wrong_recipe_is_told_as_the_reference_shows(folder, merger):
    (folder / "recipe.yaml").write_text(
        "base: models/base\nexperts:\n  math: models/code\n  lm: {model: models/french,\n    wieght: 0.5}\n"
        "method: ties\nparameters:\n  density: 1.5\nrules:\n  - {kinds: [head], use: mth}\noutput: {path: out}\n"
    )
    ((_, expected),) = (entry for block in blocks("docs/recipe-reference.md", "console") for entry in commands(block))
    ran = merger("run", "recipe.yaml")
    assert (ran.code, ran.err.splitlines()) == (2, expected)


def test_a_condition_that_holds_is_told_as_its_page_shows(folder, merger):
    recipe = yaml.safe_load(first_recipe())
    recipe["experts"].pop("chat")
    recipe["parameters"] = {"density": 0.9}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ((command, (line,)),) = (
        (command, lines)
        for block in blocks("docs/inspect.md", "console")
        for command, lines in commands(block)
        if "--fail-if" in command
    )
    ran = merger(*command[1:])
    shape = re.sub(r"0\.\d{4}", "...", re.sub(r"\(\w+, \w+\)", "(code, french)", line))
    assert ran.code == 1
    assert_shown([shape], ran.err)


# --- code -----------------------------------------------------------------------------------------


def test_the_library_code_of_the_readme_runs(folder, capsys):
    (folder / "recipe.yaml").write_text(first_recipe())
    (code,) = (block.text for block in blocks("README.md", "python") if "import merger" in block.text)
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    output = capsys.readouterr().out.splitlines()
    merge_plan = planned(Recipe.load("recipe.yaml"))
    assert int(output[0]) == merge_plan.bytes_written
    assert {"code", "french", "chat"} <= set(re.findall(r"'(\w+)'", output[1]))
    assert any(line.startswith("merging ") for line in output[2:])
    assert sum(namespace["result"].tensors.values()) == len(merge_plan.tensors)
    assert merger.verify(folder / "out" / "merged").differences == ()


def test_the_python_page_names_all_run_options():
    (sentence,) = re.findall(r"takes the same `RunOptions`: ([\w\s,]+)\.", text("docs/python.md"))
    assert re.findall(r"\w+", sentence.replace(" and ", ", ")) == [
        field.name for field in dataclasses.fields(RunOptions)
    ]


def test_code_of_methods_in_the_docs_is_that_of_their_files():
    (excerpt,) = ast.parse(blocks("docs/experts.md", "python")[0].text).body
    module = ast.parse((ROOT / "merger" / "methods" / f"{excerpt.name}.py").read_text())
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == excerpt.name)
    function.body = function.body[1:]  # without its docstring
    assert ast.dump(excerpt) == ast.dump(function)


# --- tables ---------------------------------------------------------------------------------------


def rows(page, heading):
    """The cells of the rows of the table that begins with this row of headings."""
    table = text(page).partition(heading)[2].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


CHOICE = "docs/choosing-a-method.md"


def test_the_methods_in_a_line_each_are_all_that_there_are():
    names = {name for method, _ in rows(CHOICE, "| method | in a line |") for name in re.findall(r"`(\w+)`", method)}
    with_recipe = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    methods = {
        name
        for name, entry in ENTRIES.items()
        if entry.kind == "method" or (entry.kind in ("merger", "pack") and name in with_recipe)
    }
    assert names - ENTRIES.keys() == set()
    assert methods - names == set()


def test_the_advice_is_that_of_the_library():
    table = [
        (re.findall(r"`(\w+)`", method)[0], kept) for _, method, kept, _ in rows(CHOICE, "| you have | begin with |")
    ]
    assert table == [
        (advice.method, "not measured" if advice.share is None else f"{advice.share:.3f}") for advice in RECOMMENDATIONS
    ]


def test_the_scores_of_the_reference_are_all_that_there_are():
    (sentence,) = re.findall(r"is said by a score: (.*?)\. ", text("docs/recipe-reference.md"), re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) == SCORES.keys()


def test_the_exit_codes_of_the_commands_are_those_of_the_errors():
    kinds = [
        errors.ConditionError,
        errors.RecipeError,
        errors.CheckpointError,
        errors.ResourceError,
        errors.VerifyError,
    ]
    ends = [errors.DEFECT, errors.INTERRUPTED, errors.CLOSED_PIPE]
    codes = [int(code) for code, _ in rows("docs/commands.md", "| code | meaning |")]
    assert codes == [0, *(kind.exit_code for kind in kinds), *ends]


METHOD_PAGES = sorted(
    path for path in ROOT.glob("docs/methods/*.md") if path.name not in ("README.md", "parameters.md")
)


@pytest.mark.parametrize("name", [name for name, entry in {**ENTRIES, **SCORES}.items() if entry.package is None])
def test_every_method_stage_and_score_has_a_section(name):
    beginnings = re.compile(r"^(#|\| `|- \*\*`).*", re.MULTILINE)
    lines = [line[0].partition(" | ")[0] for path in METHOD_PAGES for line in beginnings.finditer(path.read_text())]
    assert any(f"`{name}`" in line for line in lines)


def test_the_index_of_methods_names_every_page_and_method():
    index = text("docs/methods/README.md")
    table = index[: index.index("`merger methods NAME`")]
    index_names = set(re.findall(r"`([\w*]+)`", table))
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", table)) == {path.name for path in METHOD_PAGES} | {"parameters.md"}
    patterns = [re.compile(name.replace("*", r"\w*")) for name in index_names]
    assert [name for name in {**ENTRIES, **SCORES} if not any(pattern.fullmatch(name) for pattern in patterns)] == []


WRITERS = ["methods_table", "recipe_reference", "commands_reference", "docs_pictures"]


@pytest.mark.parametrize("script", WRITERS)
def test_what_a_script_writes_into_the_docs_is_up_to_date(script):
    path = ROOT / "scripts" / f"{script}.py"
    checked = subprocess.run([sys.executable, path, "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_words_for_the_picture_have_its_figures(page):
    (words,) = re.findall(r"!\[(.*)\]\(.*share-kept\.svg\)", text(page))
    (label,) = re.findall(r'aria-label="([^"]*)"', text("docs/pictures/share-kept.svg"))
    assert re.findall(r"0\.\d+", words) == re.findall(r"0\.\d+", label)


def test_the_shares_of_the_first_screen_are_those_that_were_measured():
    shares = re.findall(r"(\d+) %", README.partition("![")[0])
    assert shares == [f"{100 * advice.share:.0f}" for advice in (QUICK, WEIGHTS, TEXT)]


def test_the_readme_can_be_read_in_five_minutes():
    assert len(README.split()) < 1200


def test_the_index_names_every_page():
    links = set(re.findall(r"\]\(([\w/-]+\.(?:md|ipynb))\)", text("docs/index.md")))
    pages = {f"{path.relative_to(ROOT / 'docs')}" for path in ROOT.glob("docs/*.md")}
    assert pages - links == {"index.md"}
    assert {f"notebooks/{path.name}" for path in ROOT.glob("docs/notebooks/*.ipynb")} <= links


@pytest.mark.parametrize("name", ["obim", "cabs"])
def test_the_defaults_of_a_page_are_those_of_the_signature(name):
    facts = methods_json(name)["parameters"]
    for cells in rows(f"docs/methods/{name}.md", "| parameter | default |"):
        names, defaults = (
            re.findall(r"`(\w+)`", cells[0]),
            [part.split()[0].strip("`") for part in cells[1].split(", ")],
        )
        defaults = defaults if len(defaults) == len(names) else defaults * len(names)
        assert {key: str(facts[key]["default"]).lower() for key in names} == dict(zip(names, defaults, strict=True))


def test_other_defaults_that_the_pages_mention_are_those_of_the_signatures():
    wudi, sparsification = text("docs/methods/wudi.md"), text("docs/methods/sparsification.md")
    defaults = {
        ("wudi", "ridge"): re.search(r"`(\w+)` \(default\)", wudi)[1],
        ("pcb", "variant"): re.search(r"`variant: (\w+)` \(default\)", sparsification)[1],
        ("breadcrumbs", "lambda"): float(re.search(r"times λ = ([\d.]+\d)", sparsification)[1]),
    }
    assert defaults == {(name, key): methods_json(name)["parameters"][key]["default"] for name, key in defaults}
