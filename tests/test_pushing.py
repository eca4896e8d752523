"""Pushing, to a stand-in for the Hub on 127.0.0.1: what arrives, what is refused, and how it goes on after a break."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import pytest
from checkpoints import save, trio
from huggingface_hub import constants
from loopback import TOKEN, Handler, point_at, serving

from merger.engine.merge import merge
from merger.recipe.recipe import Recipe

REPO = "org/merged"
# how huggingface_hub sends a file over Git LFS, in the words of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repository:
    """What the stand-in keeps of a repository."""

    private: bool = True
    files: dict = field(default_factory=dict)  # their content, or their SHA-256 where it is stored elsewhere
    commits: int = 0

    def sha(self):
        return f"{self.commits:040x}"


class Hub(Handler):
    """As much of the Hub's HTTP interface as an upload needs, of Git LFS and of the Xet storage."""

    def do_GET(self):
        self.serve(b"")

    def do_HEAD(self):
        self.serve(b"")

    def do_POST(self):
        self.serve(self.body())

    def do_PUT(self):
        self.serve(self.body())

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def serve(self, body):
        path = unquote(urlsplit(self.path).path)
        server = self.server
        server.log.append(f"{self.command} {path}")
        if server.fail and (failure := server.fail(self.command, path)) is not None:
            return self.fail(failure)
        return getattr(self, f"on_{self.topic(path)}")(path, body)

    def topic(self, path):
        topics = (
            "create",
            "preupload",
            "commit",
            "batch",
            "lfs",
            "xet-write-token",
            "whoami-v2",
            "validate-yaml",
            "v1",
        )
        parts = path.split("/")
        return next(
            (name.replace("-", "_") for name in topics if name in (parts[-1], *parts[-2:], *parts[1:2])), "info"
        )

    def fail(self, failure):
        if failure == "drop":
            self.close_connection = True
            return self.connection.close()
        status, error = failure
        return self.answer(status, json.dumps({"error": f"no, not with {TOKEN}"}).encode(), error=error)

    def json(self, value, status=200):
        return self.answer(status, json.dumps(value).encode())

    def repository(self, path):
        return self.server.repositories.get("/".join(path.removeprefix("/api/models/").split("/")[:2]))

    def on_info(self, path, body):
        repository = self.repository(path)
        if repository is None:
            return self.answer(404, error="RepoNotFound")
        siblings = [
            {"rfilename": name, "lfs": {"sha256": data, "size": 1, "pointerSize": 1}}
            if isinstance(data, str)
            else {"rfilename": name, "size": len(data)}
            for name, data in repository.files.items()
        ]
        return self.json({"id": REPO, "sha": repository.sha(), "private": repository.private, "siblings": siblings})

    def on_whoami_v2(self, path, body):
        return self.json({"name": "org", "type": "user"})

    def on_validate_yaml(self, path, body):
        return self.json({"warnings": [], "errors": []})

    def on_create(self, path, body):
        content = json.loads(body)
        private = content.get("private") or content.get("visibility") == "private"
        self.server.repositories[f"{content['organization']}/{content['name']}"] = Repository(private)
        return self.json({"url": f"{self.server.endpoint}/{REPO}"})

    def on_preupload(self, path, body):
        stored = self.repository(path).files
        files = [
            {
                "path": (name := file["path"]),
                "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": oid(stored[name]) if name in stored else None,
            }
            for file in json.loads(body)["files"]
        ]
        return self.json({"files": files})

    def on_commit(self, path, body):
        repository = self.repository(path)
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.spoil or value["oid"]
        repository.commits += 1
        return self.json(
            {"commitUrl": f"{self.server.endpoint}/{REPO}/commit/{repository.sha()}", "commitOid": repository.sha()}
        )

    # --- Git LFS ---

    def on_batch(self, path, body):
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
        return self.json({"transfer": "basic", "objects": objects})

    def on_lfs(self, path, body):
        self.server.blobs[path.rpartition("/")[2]] = body
        return self.answer(200)

    # --- Xet: chunks are taken, and never asked for again ---

    def on_xet_write_token(self, path, body):
        token = {"casUrl": self.server.endpoint, "exp": int(time.time()) + 9999, "accessToken": "xet"}
        return self.json(token)

    def on_v1(self, path, body):
        if path.startswith("/v1/chunks/"):
            return self.answer(404)
        self.server.blobs[path] = body
        return self.json({"was_inserted": True, "result": 1})


def oid(data):
    """As git names a small file; a large one goes by its SHA-256."""
    return data if isinstance(data, str) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, as the Hub of this process."""
    with serving(Hub, repositories={}, blobs={}, log=[], fail=None, spoil=None) as server:
        point_at(monkeypatch, server.endpoint)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


def switch_xet(monkeypatch, *, off):
    """Git LFS takes its place; versions before 1.0 do not know the name of the switch."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", off, raising=False)


@pytest.fixture
def merged(tmp_path):
    """A finished merge of two shards."""
    trio(tmp_path)
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "method": "linear"}
    merge(Recipe.parse({**content, "output": {"path": "out", "shard_size": 900}}, tmp_path))
    return tmp_path / "out"


def holds(hub, folder):
    """Whether the stand-in has every file of a folder."""
    remote_files = hub.repositories[REPO].files
    local_files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return remote_files == {n: sha256(data) if n.endswith(".safetensors") else data for n, data in local_files.items()}


@pytest.mark.parametrize("storage", ["xet", "lfs"])
def test_a_merge_is_pushed_whole_and_private(merger, hub, merged, monkeypatch, storage):
    switch_xet(monkeypatch, off=storage == "lfs")
    ran = merger("push", merged, REPO)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{merged}: uploaded: {REPO} (private) at {'1'.zfill(40)}, 2 shards as in merger.json\n"
    assert holds(hub, merged)
    assert {"README.md", "merger.json"} < hub.repositories[REPO].files.keys()
    assert hub.repositories[REPO].private


def test_a_push_of_what_is_there_sends_nothing_and_says_so(merger, hub, merged):
    merger("push", merged, REPO)
    hub.log.clear()
    ran = merger("push", merged, REPO, "--json")
    assert json.loads(ran.out) == {
        "repository": REPO, "commit": "1".zfill(40), "private": True, "unchanged": True, "shards": 2,
    }  # fmt: skip
    assert not any("/commit/" in line for line in hub.log)


def test_a_public_repository_has_to_be_meant(merger, hub, merged):
    hub.repositories[REPO] = Repository(private=False)
    ran = merger("push", merged, REPO)
    assert (ran.code, ran.err) == (
        2,
        f"error: {REPO}: everyone can see it; say --public if that is meant, or name another one\n",
    )
    assert hub.repositories[REPO].files == {}
    assert "(public)" in merger("push", merged, REPO, "--public").out
    assert holds(hub, merged)


def test_a_new_repository_is_public_on_request(merger, hub, merged):
    merger("push", merged, REPO, "--public")
    assert not hub.repositories[REPO].private


# --- what is no whole merge, or would not be one there ---------------------------------------------


def cut_a_shard(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def lose_a_shard(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()


def mix_in_another(folder):
    (folder / "model-00003-of-00003.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )


def change_the_config(folder):
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_a_shard, "model-00002-of-00002.safetensors: its header is broken: the file is truncated"),
        (lose_a_shard, "model-00001-of-00002.safetensors: is missing, though merger.json names it"),
        (mix_in_another, "model-00003-of-00003.safetensors: holds weights that merger.json does not name"),
        (change_the_config, "config.json: its SHA-256 is "),
    ],
)
def test_what_is_not_whole_is_not_pushed(merger, hub, merged, damage, message):
    damage(merged)
    ran = merger("push", merged, REPO)
    assert ran.code == 5
    assert f"error: {merged}: {message}" in ran.err
    assert hub.log == []


def test_a_folder_that_is_no_merge_is_not_pushed(merger, hub, tmp_path):
    for folder in (save(tmp_path / "model", {}), tmp_path / "absent"):
        ran = merger("push", folder, REPO)
        assert ran.code == 3
        assert ran.err.startswith(f"error: {folder}: ")
    assert hub.log == []


def test_weights_of_another_model_are_not_left_beside_this_one(merger, hub, merged):
    hub.repositories[REPO] = Repository(files={"model.safetensors": "0" * 64, "README.md": b"old"})
    ran = merger("push", merged, REPO)
    assert ran.code == 2
    assert f"error: {REPO}: holds model.safetensors, which this model has not" in ran.err
    assert hub.repositories[REPO].files["README.md"] == b"old"


def test_a_shard_that_arrived_as_another_is_told(merger, hub, merged):
    hub.spoil = "0" * 64
    ran = merger("push", merged, REPO)
    assert ran.code == 5
    assert f"error: {REPO}: model-00001-of-00002.safetensors: its SHA-256 is {'0' * 64}, but " in ran.err


# --- failure --------------------------------------------------------------------------------------


def always(method, ending, failure):
    return lambda command, path: failure if command == method and path.endswith(ending) else None


GATED, BAD_TOKEN, FORBIDDEN, WRONG, BROKEN = (403, "GatedRepo"), (401, None), (403, None), (400, None), (503, None)


@pytest.mark.parametrize(
    ("fail", "code", "message"),
    [
        (always("GET", REPO, GATED), 2, "is gated; ask for access on its page, then `hf auth login`"),
        (always("POST", "create", BAD_TOKEN), 2, "127.0.0.1 does not know you; `hf auth login`, or set HF_TOKEN"),
        (always("POST", "create", FORBIDDEN), 2, "your token may not write there; take one that may"),
        (always("POST", "preupload/main", FORBIDDEN), 2, "your token may not write there; take one that may"),
        (always("POST", "preupload/main", (404, "RepoNotFound")), 2, "is not on 127.0.0.1, or not for you"),
        (always("POST", "commit/main", WRONG), 2, "127.0.0.1 refuses it (400)"),
        (always("POST", "commit/main", BROKEN), 4, "127.0.0.1 could not be reached, or broke off (503); push again"),
        (always("GET", REPO, "drop"), 4, "127.0.0.1 could not be reached, or broke off ("),
        (always("POST", "preupload/main", "drop"), 4, "127.0.0.1 could not be reached, or broke off ("),
    ],
)
def test_failures_say_what_to_do_and_never_the_token(merger, hub, merged, fail, code, message):
    hub.fail = fail
    ran = merger("push", merged, REPO)
    assert ran.code == code
    assert ran.err.startswith(f"error: {REPO}: {message}")
    assert len(ran.err.splitlines()) == 1
    assert TOKEN not in ran.err
    assert "http" not in ran.err.replace("httpx", "")


def test_a_hub_that_cannot_be_reached_is_named_without_its_credentials(merger, hub, merged, monkeypatch):
    point_at(monkeypatch, f"http://user:{TOKEN}@127.0.0.1:9")
    ran = merger("push", merged, REPO)
    assert ran.code == 4
    assert ran.err.startswith(f"error: {REPO}: 127.0.0.1 could not be reached")
    assert TOKEN not in ran.err


@pytest.mark.parametrize("name", ["merged", "org/merged@main", "./org/merged", "a/b/c", ""])
def test_a_name_that_is_none_is_told_before_anything_is_sent(merger, hub, merged, name):
    ran = merger("push", merged, name)
    assert (ran.code, ran.err) == (2, f"error: {name}: is no name of a repository; give it as org/name\n")
    assert hub.log == []


def test_nothing_is_sent_where_the_environment_says_offline(merger, hub, merged, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = merger("push", merged, REPO)
    assert (ran.code, hub.log) == (2, [])
    assert "HF_HUB_OFFLINE is set" in ran.err


@pytest.mark.parametrize("route", ["preupload/main", "/objects/batch", "commit/main"])
def test_a_connection_that_drops_once_is_tried_again(merger, hub, merged, monkeypatch, route):
    switch_xet(monkeypatch, off="batch" in route)
    dropped = []

    def once(command, path):
        if path.endswith(route) and not dropped:
            dropped.append(path)
            return "drop"
        return None

    hub.fail = once
    ran = merger("push", merged, REPO)
    assert (ran.code, len(dropped)) == (0, 1)
    assert holds(hub, merged)


def test_a_push_that_broke_off_goes_on_with_what_is_missing(merger, hub, merged, monkeypatch):
    switch_xet(monkeypatch, off=True)
    shard_hash = sha256((merged / "model-00002-of-00002.safetensors").read_bytes())
    hub.fail = always("PUT", shard_hash, "drop")
    assert merger("push", merged, REPO).code == 4
    assert hub.repositories[REPO].files == {}

    hub.fail, hub.log[:] = None, []
    assert merger("push", merged, REPO).code == 0

    assert [line for line in hub.log if line.startswith("PUT")] == [f"PUT /lfs/{shard_hash}"]
    assert holds(hub, merged)


def test_the_environment_alone_points_the_command_at_a_hub(hub, merged):
    """In a process of its own, as huggingface_hub reads the environment when it is imported."""
    ran = subprocess.run(
        [sys.executable, "-m", "merger", "push", str(merged), REPO],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert holds(hub, merged)
