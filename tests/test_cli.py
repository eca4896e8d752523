"""The command line: what goes to stdout and what to stderr, exit codes, and what a signal does."""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from checkpoints import save_headers
from markdown import ROOT
from rich.console import Console
from typer.main import get_command

from merger import cli
from merger._version import VERSION
from merger.cli import app
from merger.cli._options import RUN_FLAGS
from merger.options import RunOptions
from merger.pipeline.registry import ENTRIES, SCORES
from merger.recipe.recommendations import RECOMMENDATIONS, WEIGHTS

COMMANDS = sorted(get_command(app).commands)
RECIPE = """\
base: base
experts: {code: code, math: math}
method: ties
output: {path: out}
"""
SLOW = """\
import sys, time
from merger.checkpoint.checkpoint import Checkpoint
read = Checkpoint.read_into
def slow(*arguments):
    time.sleep(0.2)
    return read(*arguments)
Checkpoint.read_into = slow
from merger.cli import main
sys.argv = ["merger", "run", "recipe.yaml"]
main()
"""


# --- help -----------------------------------------------------------------------------------------


def test_every_run_option_is_a_flag_or_a_callback():
    options = {option.name for option in dataclasses.fields(RunOptions)}
    assert options == RUN_FLAGS.keys() - {"quiet"} | {"progress", "notice"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(merger, command, flag):
    ran = merger(command, flag)
    assert (ran.code, ran.err) == (0, "")
    assert f"merger {command}" in ran.out
    summary = get_command(app).commands[command].help.splitlines()[0]
    assert summary.split()[:4] == [word for word in ran.out.split() if word in summary.split()][:4]


def test_help_names_every_command(merger):
    ran = merger("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("rnu",), ("run",), ("run", "recipe.yaml", "--fast")])
def test_what_is_not_understood_is_exit_code_2(merger, arguments):
    ran = merger(*arguments)
    assert ran.code == 2
    assert "Usage: merger" in ran.out + ran.err


def test_every_file_of_the_command_line_adds_its_command_by_itself():
    files = {path.stem for path in Path(cli.__file__).parent.glob("[!_]*.py")}
    assert {command.callback.__module__.rpartition(".")[2] for command in app.registered_commands} == files


def test_the_version_is_told(merger):
    ran = merger("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"merger {VERSION}\n", "")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from merger.cli import main; sys.argv = ['merger', '--help']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'pydantic', 'yaml', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


# --- run ------------------------------------------------------------------------------------------


def test_a_run_says_one_line_and_what_to_type_next_when_piped(merger, folder):
    ran = merger("run", "recipe.yaml")
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 2
    assert ran.out.startswith(f"{folder}/out: 21 merged tensors; read ")


def test_json_is_exactly_one_object(merger, folder):
    ran = merger("run", "recipe.yaml", "--json", "--set", "seed=5")

    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 1
    content = json.loads(ran.out)
    assert {
        "output", "seconds", "bytes_read", "bytes_written", "tensors", "peak_memory_bytes",
        "peak_device_memory_bytes", "device", "seed", "packed",
    } <= content.keys()  # fmt: skip
    assert content["tensors"] == {"merged": 21, "copied": 0, "dropped": 0}
    assert content["seed"] == 5


def test_remarks_go_to_stderr_whole_unless_quiet(merger, folder):
    pattern = "a.pattern.so.long.that.it.would.not.fit.a.line.of.a.terminal.and.matches.no.tensor.of.any.model"
    extra = ["--set", f"rules=[{{tensors: {pattern}, use: base}}]"]

    ran = merger("run", "recipe.yaml", *extra)
    quiet = merger("run", "recipe.yaml", "--force", "--quiet", *extra)

    assert ran.err == f"note: rule 1 (tensors: {pattern}) matches no tensor\n"
    assert (quiet.code, quiet.err) == (0, "")


def on_a_terminal(*command):
    """What a command shows on a terminal by stderr, and what it writes to stdout, which is a pipe."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=follower, env=environment)
    os.close(follower)
    display = b""
    while True:
        try:
            display += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    output, _ = process.communicate()
    os.close(leader)
    assert process.returncode == 0
    return display, output


def test_the_json_of_an_unchanged_output_goes_to_stdout_beside_a_terminal(merger, folder):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--quiet")
    _, output = on_a_terminal("-m", "merger", "run", "recipe.yaml", "--locked", "--json")
    assert json.loads(output)["unchanged"] is True


def test_on_a_terminal_a_bar_shows_bytes_rate_and_time_left(folder):
    display, output = on_a_terminal("-c", SLOW.replace("0.2", "0.02"))
    assert len(output.splitlines()) == 2
    for sign in (rb"merging", rb"[\d.]+ kB of [\d.]+ kB, [\d.]+ k?B/s", rb"\d+%", rb"ETA", rb"\d:\d\d:\d\d"):
        assert re.search(sign, display)


# --- stopping it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_130_and_nothing_left(folder, number):
    paths = sorted(folder.rglob("*"))
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not Path("out.partial/model/model.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.02)

    process.send_signal(number)
    output, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert (output, err) == ("", "interrupted; nothing was left half-written\n")
    assert sorted(folder.rglob("*")) == paths


def test_a_closed_pipe_is_met_in_silence(folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "merger", "schema"]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ran.stderr == ""


# --- plan -----------------------------------------------------------------------------------------


def test_a_plan_writes_nothing_and_says_what_would_be_done(merger, folder):
    paths = sorted(folder.rglob("*"))

    ran = merger("plan", "recipe.yaml", "--set", "rules=[{tensors: norm, use: math}]")

    assert (ran.code, ran.err) == (0, "")
    assert sorted(folder.rglob("*")) == paths
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["model.layers.*.mlp.up_proj.weight", "2", "8x4", "F32", "linear", "ties"] in rows
    assert ["model.norm.weight", "1", "4", "F32", "vector", "copy", "from", "math"] in rows
    assert "writes 0.00 GB" in ran.out
    assert "more than once where the whole model is ranked" in ran.out


def test_a_plan_in_json_has_the_same_facts(merger, folder):
    ran = merger("plan", "recipe.yaml", "--json")

    content = json.loads(ran.out)
    assert len(ran.out.splitlines()) == 1
    assert (content["tensors"], content["experts"]) == (21, ["code", "math"])
    assert content["bytes_read"] == 3 * content["bytes_written"] == 4848
    assert content["passes_over_model"] is True
    assert content["calibrated"] is False
    assert sum(group["count"] for group in content["groups"]) == 21
    assert {"memory", "disk_free", "notes", "dropped"} <= content.keys()


def test_a_plan_tells_what_is_dropped_and_what_differs(merger, folder):
    tied = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    body = {"model.embed_tokens.weight": (8, 4), "model.layers.0.w.weight": (4, 4)}
    save_headers(folder / "base", body, tied)
    save_headers(folder / "code", {**body, "model.value_head.weight": (8, 4)}, {**tied, "rope_theta": 7})
    save_headers(folder / "math", body, tied)

    ran = merger("plan", "recipe.yaml", "--set", "rules=[{tensors: value_head, use: base}]")

    assert "dropped from code: model.value_head.weight: rule 1 keeps the base, which has none\n" in ran.out
    assert "note: code: config differs from the base: rope_theta None -> 7\n" in ran.out


def test_a_tensor_named_like_markup_is_shown_as_it_is(merger, folder):
    for name in ("base", "code", "math"):
        save_headers(folder / name, {"[/bold]x[red]": (2, 2)})
    ran = merger("plan", "recipe.yaml")
    assert ran.code == 0
    assert "[/bold]x[red]" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--set", "method=tis"], 2),
        (["--set", "output.path=code/out"], 2),
        (["--set", "base=./nowhere"], 3),
        (["--max-memory", "1MB"], 4),
    ],
)
def test_a_plan_ends_in_the_exit_code_of_the_run(merger, folder, arguments, code):
    assert merger("plan", "recipe.yaml", *arguments).code == code
    assert merger("run", "recipe.yaml", *arguments).code == code


# --- methods and schema ---------------------------------------------------------------------------


def test_methods_lists_every_method_stage_and_score_whole(merger):
    ran = merger("methods")
    assert (ran.code, ran.err) == (0, "")
    for entry in (*ENTRIES.values(), *SCORES.values()):
        assert f" {entry.name} " in ran.out
        assert entry.summary in ran.out


@pytest.mark.parametrize("name", [*ENTRIES, *SCORES])
def test_every_method_shows_its_parameters_and_paper(merger, name):
    ran = merger("methods", name)
    assert (ran.code, ran.err) == (0, "")
    entry = {**SCORES, **ENTRIES}[name]
    assert entry.summary in ran.out
    assert entry.paper in ran.out
    content = json.loads(merger("methods", name, "--json").out)
    assert (content["name"], content["kind"], content["summary"]) == (name, entry.kind, entry.summary)
    assert all(f" {parameter} " in ran.out for parameter in content["parameters"])


def test_what_a_method_expands_to_can_be_pasted_into_a_recipe(merger, folder):
    listing = merger("methods", "ties").out.split("expands to:\n")[1].split("\n   ")[0]
    stages = yaml.safe_load("\n".join(line for line in listing.splitlines() if line.startswith("  - ")))
    assert [next(iter(stage)) for stage in stages] == ["top", "sign_elect", "scale"]

    ran = merger("run", "recipe.yaml")
    document = {**yaml.safe_load(RECIPE), "pipeline": stages, "output": {"path": "spelled"}}
    del document["method"]
    Path("spelled.yaml").write_text(yaml.safe_dump(document))
    pasted = merger("run", "spelled.yaml")

    assert (ran.code, pasted.code) == (0, 0)
    assert Path("out/model.safetensors").read_bytes() == Path("spelled/model.safetensors").read_bytes()


def test_methods_begin_with_what_to_start_with(merger):
    lines = merger("methods").out.split("\n\n")[0].splitlines()
    assert lines[0] == "Start here"
    rows = [
        line.strip() for line in lines if any(line.strip().startswith(advice.purpose) for advice in RECOMMENDATIONS)
    ]
    assert [re.split(r"  +", row) for row in rows] == [
        [advice.purpose, advice.method, "-" if advice.share is None else f"{advice.share:.3f}", advice.reason]
        for advice in RECOMMENDATIONS
    ]
    assert lines[-1].startswith("merger init BASE EXPERT... [--data NAME=FILE ...] writes a recipe of the first, ")


def test_what_to_start_with_keeps_words_whole_at_80_columns(merger, monkeypatch):
    monkeypatch.setattr(
        "merger.cli.methods.make_console", lambda: Console(width=80, force_terminal=True, no_color=True)
    )
    lines = re.sub(r"\x1b\[\d*m", "", merger("methods").out).split(" methods  ")[0].splitlines()
    words = {word for line in lines for word in line.split()}
    expected = {
        word for advice in RECOMMENDATIONS for word in f"{advice.purpose} {advice.method} {advice.reason}".split()
    }
    assert expected - words == set()
    assert max(map(len, lines)) <= 80


def test_what_to_start_with_is_beside_each_method_in_json(merger):
    content = json.loads(merger("methods", "--json").out)
    advice = [advice for entries in content.values() for entry in entries for advice in entry["start_here"]]
    assert sorted(item["purpose"] for item in advice) == sorted(item.purpose for item in RECOMMENDATIONS)
    assert json.loads(merger("methods", "wudi_svc", "--json").out)["start_here"][0] == dataclasses.asdict(WEIGHTS)


@pytest.mark.parametrize("advice", RECOMMENDATIONS, ids=lambda advice: advice.purpose)
def test_a_share_that_is_shown_is_that_of_the_benchmark(advice):
    assert advice.method in ENTRIES
    assert (advice.share is None) == (advice.source is None)
    if advice.source is not None:
        rows = (ROOT / advice.source).read_text().splitlines()
        of_method = [row for row in rows if re.match(rf"\| {advice.method} (\| {{}} )?\|", row)]
        assert [row.split(" | ")[-1] for row in of_method] == [f"{advice.share:.3f} |"]


def test_methods_in_json_are_one_object_by_kind(merger):
    ran = merger("methods", "--json")
    content = json.loads(ran.out)
    assert set(content) == {"method", "sparsifier", "merger", "pack", "filter", "scale", "score"}
    assert {"linear", "sum"} <= {entry["name"] for entry in content["merger"]}


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("ties", []),
        ("obim", ["text"]),
        ("obm", ["text"]),
        ("slerp", []),
        ("featcal", ["text"]),
        ("distill", ["text", "gradients"]),
        ("fisher", ["text", "gradients"]),
        ("adamerging", ["text", "gradients"]),
        ("learn", ["text", "gradients"]),
        ("doge", []),
    ],
)
def test_methods_say_what_they_need_beside_the_weights(merger, name, needs):
    assert json.loads(merger("methods", name, "--json").out)["needs"] == needs
    assert ("needs: " + ", ".join(needs) in merger("methods", name).out.splitlines()) == bool(needs)
    row = next(line for line in merger("methods").out.splitlines() if line.strip().startswith(f"{name} "))
    assert re.split(r"  +", row.strip())[1] == (", ".join(needs) or {**SCORES, **ENTRIES}[name].summary)


def test_an_unknown_method_offers_the_near_one(merger):
    ran = merger("methods", "tise")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: there is no method, stage or score 'tise'; did you mean 'ties'?\n"


def test_the_schema_is_a_json_schema_that_accepts_the_recipe(merger):
    ran = merger("schema")
    schema = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(RECIPE))


def test_without_a_terminal_a_long_merge_prints_a_line_of_progress_now_and_then(merger, folder, monkeypatch):
    assert merger("run", "recipe.yaml").err == ""
    monkeypatch.setattr("merger.cli._terminal.INTERVAL", 0)
    ran = merger("run", "recipe.yaml", "--force")
    size = r"[\d.]+ (B|kB|MB)"
    assert re.fullmatch(rf"(merging: \d+% of {size}\n)+", ran.err)
    shares = [int(share) for share in re.findall(r"(\d+)%", ran.err)]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert merger("run", "recipe.yaml", "--force", "--quiet").err == ""
