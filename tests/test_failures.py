"""How commands end that fail: a line on stderr, an exit code of its own, and never a traceback for a user's mistake."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import llama, save
from test_fuzz import fuzz  # noqa: F401 a fixture
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from merger.checkpoint.disk import disk_error
from merger.checkpoint.opening import open_checkpoint
from merger.cli._failures import report
from merger.demo import demo
from merger.errors import UnreadableError
from merger.pipeline.registry import ENTRIES, merger

RECIPE = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out, shard_size: 300}\n"
ALLOCATION = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9."


def process(*arguments, code="", **options):
    """`merger` in a process of its own, before which the lines ``code`` are run."""
    program = f"{code}\nimport sys\nfrom merger.cli import main\nsys.argv = ['merger', *{list(arguments)!r}]\nmain()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", program], env=environment, **options)


# --- inside a method ------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """Makes the method `failing` out of what it does."""

    def make(work):
        @merger()
        def failing(deltas):
            """Fails."""
            work(deltas)

        monkeypatch.setitem(ENTRIES, "failing", ENTRIES.pop("failing"))

    return make


def raising(kind, *arguments):
    def work(_):
        raise kind(*arguments)

    return work


INSIDE = {
    "shapes": (2, lambda deltas: deltas + torch.ones(3, 7, 11), "RuntimeError: The size of tensor "),
    "a typing mistake": (2, lambda deltas: deltas.summ(0), "AttributeError: "),
    "host memory": (4, lambda deltas: torch.empty(1 << 60), "out of memory (["),
    "Python's memory": (4, raising(MemoryError), "out of memory; cap it with --max-memory"),
    "NumPy's memory": (4, lambda deltas: np.empty(1 << 50), "out of memory (Unable to allocate "),
    "device memory": (
        4,
        raising(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        "the GPU is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); use --device cpu",
    ),
    "torch's allocator": (4, raising(RuntimeError, ALLOCATION), "out of memory ([enforce fail"),
    "a matrix without a root": (
        3,
        lambda deltas: torch.linalg.cholesky(-torch.eye(3)),
        "a matrix cannot be decomposed (linalg.cholesky: The factorization could not be completed",
    ),
    "a decomposition that does not converge": (
        3,
        raising(torch.linalg.LinAlgError, "linalg.svd: The algorithm failed to converge"),
        "a matrix cannot be decomposed (linalg.svd: The algorithm failed to converge); leave the tensor to the base",
    ),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_an_error_inside_a_method_names_tensor_and_stage(merger, folder, failing, kind):
    code, work, reason = INSIDE[kind]
    failing(work)
    paths = sorted(folder.rglob("*"))

    ran = merger("run", "recipe.yaml", "--set", "method=failing")

    assert (ran.code, ran.out) == (code, "")
    (line,) = ran.err.splitlines()
    tensor, _, message = line.removeprefix("error: ").partition(": stage failing: ")
    assert tensor in ("lm_head.weight", "model.embed_tokens.weight") or tensor.startswith("model.layers.0.")
    assert message.startswith(reason)
    assert sorted(folder.rglob("*")) == paths


def test_an_error_inside_a_method_names_the_line_of_its_file(merger, folder, failing):
    failing(lambda deltas: deltas.summ(0))
    ran = merger("run", "recipe.yaml", "--set", "method=failing")
    file, line = ran.err.rstrip().rpartition("(")[2].removesuffix(")").rpartition(":")[::2]
    assert Path(file).name == "test_failures.py"
    assert "deltas.summ(0)" in Path(file).read_text().splitlines()[int(line) - 1]


# --- models ---------------------------------------------------------------------------------------


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SEEING = {"image_size": 16, "patch_size": 8}
OTHERS = {
    "ViT": lambda: ViTForImageClassification(ViTConfig(**TINY, **SEEING)),
    "CLIP": lambda: CLIPModel(
        CLIPConfig(
            text_config={**TINY, "vocab_size": 300}, vision_config={**TINY, **SEEING}, projection_dim=8
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_reads_no_text_merges_and_is_refused_where_text_is_needed(merger, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    demo.prepare(tmp_path / "demo")
    for name in ("base", "one"):
        OTHERS[kind]().save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((tmp_path / "demo" / "models" / "base" / file).read_bytes())
    text = "base: base\nexperts: {one: one}\nmethod: ties\ncalibration: {data: demo/data/shift.jsonl, samples: 2}\n"
    (tmp_path / "recipe.yaml").write_text(f"{text}output: {{path: out}}\n")

    assert merger("run", "recipe.yaml", "-q").code == 0
    ran = merger("run", "recipe.yaml", "-q", "--set", "method=obim", "--set", "output.path=other")

    assert (ran.code, ran.out) == (3, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("error: one: the model cannot be run on text, so take a method without calibration: ")
    assert not list(tmp_path.glob("other*"))


# --- the system -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "text.jsonl"), 3, "text.jsonl: Permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "data"), 3, "data: Is a directory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 4, "out/x: No space left on device"),
        (OSError(errno.EMFILE, "Too many open files", "a"), 4, "a: Too many open files"),
        (ConnectionError("the host is gone"), 4, "the host is gone"),
        (RuntimeError("can't start new thread"), 4, "out of memory (can't start new thread)"),
        (ModuleNotFoundError("No module named 'fcntl'", name="fcntl"), 4, "merger runs on Linux and macOS; on Windows"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4, "No module named 'torch'; install merger"),
        (UnicodeEncodeError("utf-8", "a\udce9b", 1, 2, "surrogates not allowed"), 2, "'a\\\\udce9b' cannot be written"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_the_system_is_a_line_too(capsys, error, code, line):
    assert report(error) == code
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_platform_without_fcntl_is_told_in_a_sentence(folder):
    ran = process("run", "recipe.yaml", code="import sys; sys.modules['fcntl'] = None")
    assert ran.returncode == 4
    assert ran.stderr.decode() == ("error: merger runs on Linux and macOS; on Windows, run it in WSL (wsl --install)\n")


def test_a_defect_keeps_its_traceback_and_has_an_exit_code_of_its_own(capsys):
    assert report(ZeroDivisionError("division by zero")) == 70
    *_, last, advice = capsys.readouterr().err.splitlines()
    assert last == "ZeroDivisionError: division by zero"
    assert advice == "error: this is a defect of merger; please report it with the lines above"


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("schema",), ("methods",), ("plan", "recipe.yaml"), ("inspect", "recipe.yaml")])
def test_a_closed_pipe_has_an_exit_code_that_no_condition_has(folder, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    ran = process(*arguments, stdout=writer)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_a_full_disk_behind_stdout_is_told(folder):
    with open("/dev/full", "wb") as full:
        ran = process("methods", stdout=full)
    assert (ran.returncode, ran.stderr) == (4, b"error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LANG": "C"}])
def test_a_terminal_without_unicode_gets_what_it_can_show(folder, environment):
    (folder / "recipe.yaml").write_text(RECIPE.replace("path: out", "path: modèle"), encoding="utf-8")
    ran = process("run", "recipe.yaml", env=environment)
    assert ran.returncode == 0
    assert b"mod\\xe8le: 21 merged tensors" in ran.stdout or "modèle".encode() in ran.stdout
    assert (folder / "modèle" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_tables_are_drawn_without_unicode_too(folder, command):
    ran = process(command, "recipe.yaml", env={"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0
    assert "model.layers" in ran.stdout.decode("ascii")


def test_an_imported_recipe_names_the_same_models_whatever_the_terminal_is(folder):
    (folder / "modèle").mkdir()
    config = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: modèle, parameters: {weight: 1}}]\n"
    (folder / "kit.yaml").write_text(config, encoding="utf-8")
    ran = process("import", "kit.yaml", env={"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0
    assert list(yaml.safe_load(ran.stdout)["experts"].values()) == ["modèle"]


def test_closed_streams_are_no_place_for_what_libraries_print(folder):
    ran = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m merger run recipe.yaml >&- 2>&-"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0
    assert (folder / "out" / "merger.json").is_file()


# --- whatever stands in a file ----------------------------------------------------------------------

COMMANDS = {
    "out/model.safetensors.index.json": [("verify", "out"), ("plan", "onward.yaml")],
    "out/config.json": [("verify", "out"), ("plan", "onward.yaml"), ("lora", "base", "out", "-o", "x", "--rank", "1")],
    "recipe.lock": [("run", "recipe.yaml", "--locked")],
}


@pytest.mark.parametrize("file", COMMANDS)
def test_a_file_with_anything_in_it_ends_no_command_in_a_traceback(merger, folder, fuzz, file):  # noqa: F811
    assert merger("run", "recipe.yaml").code == 0
    assert merger("lock", "recipe.yaml").code == 0
    (folder / "onward.yaml").write_text(RECIPE.replace("base: base", "base: out").replace("path: out", "path: two"))
    sound = json.loads((folder / file).read_bytes())
    codes = set()
    for case in range(12):
        draw = random.Random(f"{file} {case}")
        (folder / file).write_bytes(fuzz.mutated(sound, fuzz.as_json, draw))
        ran = merger(*draw.choice(COMMANDS[file]), "-q" if "plan" not in file else "--json")
        assert ran.code in (0, 2, 3, 4, 5), ran.err
        assert "Traceback" not in ran.err
        codes.add(ran.code)
    assert codes - {0}


# --- errors of the system without a number --------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("the drive\nis gone"), "the drive is gone"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(), "OSError"),
    ],
)
def test_an_error_of_the_system_is_told_in_its_own_words(tmp_path, monkeypatch, error, reason):
    def failing(*_):
        raise error

    save(tmp_path / "model", llama(0))
    monkeypatch.setattr("merger.checkpoint.checkpoint.fill_from", failing)
    model = open_checkpoint("model", None, label="base", folder=tmp_path)
    with pytest.raises(UnreadableError, match=f"model.safetensors: cannot be read: {reason}$"):
        model.read("model.norm.weight")
    assert str(disk_error(tmp_path, error)) == f"{tmp_path}: cannot be written: {reason}"
