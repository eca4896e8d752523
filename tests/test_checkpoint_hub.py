"""The Hub, stood in for by a small server on 127.0.0.1: what is fetched, what is kept, and how failure is told."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from loopback import TOKEN, Handler, point_at, serving
from safetensors.torch import save

from merger.checkpoint.opening import open_checkpoint
from merger.engine.merge import merge
from merger.errors import CheckpointError, RecipeError, ResourceError
from merger.outputs.lock import check_lock, is_done, lock
from merger.recipe.recipe import Recipe

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
WEIGHT = torch.arange(600_000.0).view(300, 2000)


def config(**options):
    return json.dumps({"model_type": "llama", **options}).encode()


def pickled(tensors, folder):
    torch.save(tensors, folder / "saved.bin")
    return (folder / "saved.bin").read_bytes()


def adding(token):
    """A model with two words, and a token of its own in the padding of its embedding."""
    return {
        "config.json": config(),
        "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}).encode(),
        "added_tokens.json": json.dumps({f"<{token}>": 2}).encode(),
        "additional_chat_templates/tool_use.jinja": token.encode(),
        "1_Pooling/config.json": b"{}",
        "1_Pooling/notes.txt": b"",
        "model.safetensors": save({"embed_tokens.weight": torch.ones(4, 2000)}),
    }


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Files by repository and revision."""
    sharded = {
        "config.json": config(),
        "tokenizer.json": b"{}",
        "modeling.py": b"raise SystemExit",
        "README.md": b"",
        "model-1.safetensors": save({"a.weight": WEIGHT}),
        "model-2.safetensors": save({"b.weight": WEIGHT + 1}),
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}
        ).encode(),
        "pytorch_model.bin": b"not needed",
        "onnx/config.json": b"{}",
    }
    old = {"config.json": config(), "model.safetensors": save({"a.weight": WEIGHT - 1})}
    folder = tmp_path_factory.mktemp("pickles")
    return {
        "org/sharded": {"main": sharded, "v1": old},
        "gpt2": {"main": {"config.json": config(), "pytorch_model.bin": pickled({"a.weight": WEIGHT}, folder)}},
        "org/gated": {"main": old},
        "org/broken": {"main": {"config.json": config(), "model.safetensors": b"\xff" * 64}},
        "org/quantised": {"main": {**old, "config.json": config(quantization_config={"quant_method": "gptq"})}},
        **{f"org/adds-{token}": {"main": adding(token)} for token in ("tool", "think")},
        "org/adapter": {
            "main": {
                "adapter_config.json": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}',
                "adapter_model.safetensors": save(
                    {
                        "base_model.model.a.lora_A.weight": torch.ones(1, 2000),
                        "base_model.model.a.lora_B.weight": torch.ones(300, 1),
                    }
                ),
            }
        },
    }


class Hub(Handler):
    """As much of the Hub's HTTP interface as a download needs."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, self.headers.get("Range")))
        api = path.startswith("/api/models/")
        path = path.removeprefix("/api/models/").strip("/")
        repository = next((name for name in self.server.repositories if path.startswith(name)), None)
        if repository is None:
            return self.answer(404, error="RepoNotFound")
        parts = path.removeprefix(repository).strip("/").split("/", 2)
        revision = parts[1] if len(parts) > 1 else "main"
        name = next((name for name, commit in COMMITS.items() if revision in (name, commit)), None)
        files = self.server.repositories[repository].get(name)
        if files is None:
            return self.answer(404, error="RevisionNotFound")
        if api:
            tree = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files.items()]
            siblings = [{"rfilename": f} | ({"size": len(d)} if self.server.sizes else {}) for f, d in files.items()]
            for sibling in siblings:
                digest = hashlib.sha256(files[sibling["rfilename"]]).hexdigest()
                large = sibling["rfilename"].endswith((".safetensors", ".bin"))
                sibling |= {"lfs": {"sha256": digest, "size": 1, "pointerSize": 1}} if large else {}
            info = {"id": repository, "sha": COMMITS[name], "siblings": siblings}
            return self.answer(200, json.dumps(tree if parts[0] == "tree" else info).encode())
        if repository == "org/gated":
            return self.answer(403, error="GatedRepo")
        return self.send_file(files[parts[2]], COMMITS[name])

    def send_file(self, data, commit):
        byte_range = self.headers.get("Range")
        if self.command == "HEAD" or byte_range is None:
            return self.answer(200, data, commit=commit)
        first, last = byte_range.removeprefix("bytes=").split("-")
        return self.answer(206, data[int(first) : int(last or len(data)) + 1], commit=commit)


@pytest.fixture(scope="module")
def server(repositories):
    with serving(Hub, repositories=repositories) as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """A client with an empty cache; gives the log of requests."""
    point_at(monkeypatch, server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server.log, server.sizes = [], True
    return server.log


def opened(source, tmp_path, adapter=None, **options):
    return open_checkpoint(source, adapter, label="math", folder=tmp_path, **options)


def fetched(log):
    return [path.rpartition("/")[2] for method, path, _ in log if method == "GET" and "/resolve/" in path]


def test_a_repository_is_downloaded_in_one_format_and_without_code(hub, tmp_path):
    with opened("org/sharded", tmp_path) as model:
        assert torch.equal(model.read("b.weight"), WEIGHT + 1)
        assert model.commit == COMMITS["main"]
    assert sorted(set(fetched(hub))) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert not any("onnx" in path for _, path, _ in hub)


@pytest.mark.parametrize("revision", ["v1", COMMITS["v1"]])
def test_a_revision_is_a_name_or_a_commit(hub, tmp_path, revision):
    with opened(f"org/sharded@{revision}", tmp_path) as model:
        assert model.commit == COMMITS["v1"]
        assert torch.equal(model.read("a.weight"), WEIGHT - 1)


def test_no_progress_bar_is_drawn_where_nobody_looks(hub, tmp_path, capfd):
    opened("org/sharded", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_second_opening_fetches_nothing(hub, tmp_path):
    opened("org/sharded", tmp_path)
    hub.clear()
    opened("org/sharded", tmp_path)
    assert fetched(hub) == []


@pytest.mark.parametrize("source", ["org/sharded", "org/sharded@v1", "gpt2"])
def test_a_plan_reads_headers_and_not_weights(hub, tmp_path, repositories, source):
    planned = opened(source, tmp_path, headers_only=True)
    parts = [byte_range for *_, byte_range in hub if byte_range]
    read = sum(int(last) - int(first) + 1 for first, last in (part[6:].split("-") for part in parts))
    weights = sum(len(data) for name, data in repositories[source[:11]]["main"].items() if "model" in name)
    assert 0 < read < weights
    assert planned.files == []
    run = opened(source, tmp_path)
    infos = {name: (info.dtype, info.shape) for name, info in run.tensors.items()}
    assert {name: (info.dtype, info.shape) for name, info in planned.tensors.items()} == infos


def test_a_plan_of_what_is_in_the_cache_reads_it_there(hub, tmp_path):
    opened("org/sharded", tmp_path)
    hub.clear()
    assert opened("org/sharded", tmp_path, headers_only=True).files
    assert fetched(hub) == []


def test_a_quantised_model_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    with pytest.raises(CheckpointError, match="is quantised"):
        opened("org/quantised", tmp_path, headers_only=True)  # as every plan begins, that of a run too
    parts = [part for method, path, part in hub if method == "GET" and path.endswith("model.safetensors")]
    assert all(parts), "a range of the file is asked for, and never all of it"


def test_models_that_do_not_fit_are_refused_before_their_weights_are_fetched(hub, tmp_path):
    experts = {"a": "org/adds-tool", "b": "org/adds-think"}
    recipe = Recipe.parse(
        {"base": "org/adds-tool", "experts": experts, "method": "linear", "output": {"path": "out"}}, tmp_path
    )
    with pytest.raises(CheckpointError, match="2 is '<tool>' in base and a and '<think>' in b"):
        merge(recipe)
    downloads = [path for _, path, part in hub if path.endswith("model.safetensors") and part is None]
    assert downloads == []
    assert not (tmp_path / "out").exists()


def test_small_files_in_folders_are_fetched_for_the_output(hub, tmp_path):
    recipe = Recipe.parse(
        {"base": "org/adds-tool", "experts": {"a": "org/adds-tool"}, "method": "linear", "output": {"path": "out"}},
        tmp_path,
    )
    merge(recipe)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tool"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert not [path for _, path, _ in hub if path.endswith("notes.txt")]


def test_an_adapter_may_come_from_the_hub_too(hub, tmp_path):
    for headers_only in (True, False):
        model = opened("org/sharded", tmp_path, "org/adapter", headers_only=headers_only)
    with model:
        assert torch.equal(model.read("a.weight"), WEIGHT + 2)
        assert model.adapter.commit == COMMITS["main"]
        assert {file.name for file in model.files} >= {"adapter_model.safetensors", "model-1.safetensors"}


def test_a_folder_wins_over_a_repository_of_its_name(hub, tmp_path):
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(CheckpointError, match=r"gpt2 has no config.json"):
        opened("gpt2", tmp_path)
    assert hub == []


@pytest.mark.parametrize("path", ["./org", "../org/name", "/org/name", "~/org", "org/name/", "a/b/c", "org/..", "a b"])
def test_what_looks_like_a_path_is_never_sent_to_the_hub(hub, tmp_path, path):
    with pytest.raises(CheckpointError, match="math: there is no folder "):
        opened(path, tmp_path)
    assert hub == []


# --- offline ---


@pytest.fixture(params=["flag", "HF_HUB_OFFLINE"])
def offline(request, monkeypatch):
    """The keyword arguments that go offline; the environment's way needs none."""
    if request.param == "flag":
        return lambda: {"offline": True}
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True) or {}


@pytest.mark.parametrize("source", ["org/sharded", "org/sharded@v1", f"org/sharded@{COMMITS['v1']}", "gpt2"])
def test_offline_reads_the_cache_without_a_request(hub, tmp_path, offline, source):
    commit = opened(source, tmp_path).commit
    hub.clear()
    for headers_only in (False, True):
        assert opened(source, tmp_path, **offline(), headers_only=headers_only).commit == commit
    assert hub == []


def test_offline_without_a_cache_says_what_to_do(hub, tmp_path, offline):
    with pytest.raises(CheckpointError, match=r"neither a folder nor in the Hub cache \(.*\), and offline") as caught:
        opened("org/sharded", tmp_path, **offline())
    one_line_without_secrets(caught)
    assert hub == []


def test_offline_with_half_of_the_shards_names_the_missing_one(hub, tmp_path, offline):
    folder = opened("org/sharded", tmp_path).directory
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-2.safetensors', which is missing"):
        opened("org/sharded", tmp_path, **offline())


# --- failure ---


def one_line_without_secrets(caught):
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    assert "http" not in message.replace("httpx", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/absent", "no repository org/absent that the Hub shows you"),
        ("org/sharded@v9", "org/sharded has no revision v9"),
        ("org/gated", "org/gated is gated; ask for access on its page, then `hf auth login`"),
        ("org/broken", "header claims 18,446,744,073,709,551,615 bytes"),
        ("org/adapter", "write {model: the model it was trained on, adapter: org/adapter}"),
    ],
)
@pytest.mark.parametrize("headers_only", [False, True])
def test_failures_say_what_to_do(hub, tmp_path, source, message, headers_only):
    with pytest.raises(CheckpointError) as caught:
        opened(source, tmp_path, headers_only=headers_only)
    assert message in str(caught.value)
    one_line_without_secrets(caught)


def test_a_hub_that_cannot_be_reached_is_named_without_its_credentials(hub, tmp_path, monkeypatch):
    point_at(monkeypatch, "http://user:hf_secret@127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"could not be fetched from 127\.0\.0\.1 \(\w+\)") as caught:
        opened("org/sharded", tmp_path)
    one_line_without_secrets(caught)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, r"the disk of \S+ is full; set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache"), CheckpointError, "/cache: Permission denied"),
        (RuntimeError(f"xet: token {TOKEN}"), CheckpointError, r"could not be fetched from \S+ \(RuntimeError\)"),
        (TimeoutError(), CheckpointError, r"\(TimeoutError\); check the connection"),
    ],
)
def test_a_download_that_breaks_is_one_line(hub, tmp_path, monkeypatch, error, kind, message):
    def breaks(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaks)
    with pytest.raises(kind, match=message) as caught:
        opened("org/sharded", tmp_path)
    one_line_without_secrets(caught)


def test_a_mirror_that_tells_no_sizes_is_asked_for_them(hub, server, tmp_path):
    server.sizes = False
    with opened("org/sharded", tmp_path, headers_only=True) as model:
        assert set(model.tensors) == {"a.weight", "b.weight"}


def test_the_environment_alone_sets_endpoint_and_offline(server, tmp_path):
    """In a process of its own, as huggingface_hub reads the environment when it is imported."""
    program = (
        "from pathlib import Path; from merger.checkpoint.opening import open_checkpoint as o\n"
        "print(o('gpt2', None, label='m', folder=Path()).commit)"
    )
    server.log, server.sizes = [], True
    environment = os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path),
    }
    for offline in ("0", "1"):
        completed = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=True,
        )
        assert completed.stdout.strip() == COMMITS["main"]
        assert server.log or offline == "1"
        server.log.clear()


def test_a_lock_holds_commits_and_hashes_and_downloads_no_weights(hub, tmp_path, repositories, monkeypatch):
    recipe = Recipe.parse(
        {
            "base": "org/sharded",
            "experts": {"math": {"model": "org/sharded", "adapter": "org/adapter"}},
            "method": "linear",
            "output": {"path": "out"},
        },
        tmp_path,
    )

    locked = lock(recipe, tmp_path / "recipe.lock")["inputs"]

    files = repositories["org/sharded"]["main"]
    assert locked["base"]["commit"] == locked["math"]["adapter"]["commit"] == COMMITS["main"]
    for name in ("model-1.safetensors", "model-2.safetensors"):
        assert locked["base"]["files"][name] == hashlib.sha256(files[name]).hexdigest()
    downloads = [path for method, path, part in hub if method == "GET" and "/model-" in path and not part]
    assert downloads == []

    check_lock(recipe, tmp_path / "recipe.lock")
    merge(recipe)
    assert is_done(recipe, tmp_path / "recipe.lock")
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    with pytest.raises(RecipeError) as caught:
        check_lock(recipe, tmp_path / "recipe.lock")
    keys = {fault.split(" was ")[0].rpartition(": ")[2] for fault in caught.value.faults[:-1]}
    assert keys == {"inputs.base.commit", "inputs.math.commit", "inputs.math.adapter.commit"}
