"""The GitHub action: its steps are run as a runner would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import trio

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Runs a step in a folder with a locked recipe: ``step("Merge", SAMPLE="2")``; its exit code and errors."""
    trio(tmp_path)
    (tmp_path / "my recipe.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: ties\noutput: {path: out}\n"
    )
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "merger"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m merger "$@"\n')
    command.chmod(0o755)
    variables = {"RECIPE": "my recipe.yaml", "OUTPUT": "out", "LOCKED": "true", "SAMPLE": "2"}
    search = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(name, **inputs):
        script = ["bash", "-e", "-o", "pipefail", "-c", STEPS[name]["run"]]
        ran = subprocess.run(
            script, cwd=tmp_path, env={**os.environ, **search, **variables, **inputs}, capture_output=True
        )
        return ran.returncode, ran.stderr.decode()

    subprocess.run([command, "lock", "my recipe.yaml"], cwd=tmp_path, env={**os.environ, **search}, check=True)
    return run


def test_a_locked_recipe_is_merged_and_verified(step, tmp_path):
    assert step("Merge") == (0, "")
    assert step("Verify") == (0, "")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    code, message = step("Verify", SAMPLE="0")
    assert code == 5
    assert "model.safetensors: is 0 bytes" in message


def test_what_is_not_as_it_was_locked_ends_the_job(step, tmp_path):
    with (tmp_path / "my recipe.yaml").open("a") as recipe:
        recipe.write("seed: 3\n")
    assert step("Merge")[0] == 2
    assert step("Merge", LOCKED="false")[0] == 0


def test_every_input_reaches_its_step_as_a_variable_and_never_as_shell_text():
    assert not any("${{" in step["run"] for step in STEPS.values())
    expressions = {value for step in STEPS.values() for value in step["env"].values()}
    assert expressions == {"${{ github.action_path }}", *(f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"])}
