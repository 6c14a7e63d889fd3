"""Download of models, from a small local server with the API of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("huggingface_hub", reason="the client of the hub")
save = pytest.importorskip("safetensors.torch").save

SHA = "5" * 40
SHARDS = {
    f"model-0000{shard}-of-00002.safetensors": save({f"weight.{shard}": torch.full((30,), shard)}) for shard in (1, 2)
}
INDEX = {f"weight.{shard}": f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
QWEN = {
    "config.json": json.dumps({"model_type": "qwen3"}).encode(),
    "generation_config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": INDEX}).encode(),
    **SHARDS,
    "tokenizer.json": b'{"version": "1.0"}',
    "merges.txt": b"a b\n",
    "original/tokenizer.model": b"dG8= 1\n",
    "original/model.safetensors": b"the same again",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"the same again",
    "picture.png": b"png",
}
MODELS: dict[str, dict[str, bytes]] = {
    "Qwen/Qwen3-tiny": QWEN,
    "meta-llama/Gated": QWEN,
    "old/OnlyPickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "half/Missing": {name: data for name, data in QWEN.items() if not name.endswith("2-of-00002.safetensors")},
    "shaky/Breaks": QWEN,
    "two/Sets": QWEN | {"model.safetensors": save({"weight.1": torch.zeros(30)})},
    "odd/Escapes": QWEN | {"model.safetensors.index.json": b'{"weight_map": {"weight.1": "../../x.safetensors"}}'},
    "odd/Numbers": QWEN | {"model.safetensors.index.json": b'{"weight_map": {"weight.1": [1]}}'},
    "odd/Deep": QWEN | {"model.safetensors.index.json": b"[" * 100_000},
}


class Hub(BaseHTTPRequestHandler):
    """The requests of `huggingface_hub`: model information, the list of files, and single files."""

    protocol_version = "HTTP/1.1"
    asked_about: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self.answer_about(found[1])
        elif found := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{SHA}", path):
            self.send_json(
                [{"type": "file", "path": name, "size": len(data), "oid": oid(data)} for name, data in files(found[1])]
            )
        elif found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{SHA}/(.+)", path):
            self.send_file(found[1], found[2])
        else:
            self.send_error_code(404, "EntryNotFound")

    def answer_about(self, model: str) -> None:
        self.asked_about.append(model)
        if model not in MODELS:
            self.send_error_code(401, "RepoNotFound")  # the hub answers alike for private and for unknown models
        else:
            siblings = [{"rfilename": name} for name, _ in files(model)]
            self.send_json({"id": model, "sha": SHA, "siblings": siblings, "private": False, "tags": []})

    def send_file(self, model: str, name: str) -> None:
        data = MODELS[model][name]
        if model == "meta-llama/Gated" and self.headers.get("Authorization") != "Bearer accepted":
            self.send_error_code(401, "GatedRepo")
        elif model == "shaky/Breaks" and "00002-of" in name and self.asked_about.count(model) == 1:
            self.send_error_code(403, "Overloaded")
        else:
            self.send(200, data, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": SHA})

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def files(model: str) -> Any:
    return MODELS[model].items()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


MANY = """
import json, os, sys
from titan_models.__main__ import main
for name, folder, token in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    print(main(["download", name, "--to", folder]), flush=True)
    print(flush=True, file=sys.stderr)
"""


def download(endpoint: str, folder: Path, *wanted: tuple[str, str, str]) -> list[tuple[int, str]]:
    """Return exit code and stderr of each command `(name, folder, token)`, all run in one subprocess."""
    arguments = json.dumps([(name, str(folder / to), token) for name, to, token in wanted])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", MANY, arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    return list(zip(codes, done.stderr.split("\n\n"), strict=False))


def test_download_fetches_weights_and_tokenizers_or_explains_the_failure(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    wanted = [
        ("Qwen/Qwen3-tiny", "qwen", "", None),
        ("Qwen/Qwen33", "a", "", "Qwen/Qwen33 was not found on the hub"),
        (
            "meta-llama/Gated",
            "b",
            "",
            "must be accepted before the download. Accept them on https://huggingface.co/meta-llama/Gated",
        ),
        ("meta-llama/Gated", "gated", "accepted", None),
        (
            "old/OnlyPickles",
            "c",
            "",
            "must have weights in model.safetensors or model-*-of-*.safetensors, got old/OnlyPickles",
        ),
        ("half/Missing", "d", "", "got half/Missing without model-00002-of-00002.safetensors"),
        ("a/b/c", "e", "", "must be OWNER/MODEL, such as Qwen/Qwen3-0.6B, got 'a/b/c'"),
        ("Qwen/Qwen3-tiny", "full", "", "must be new, empty, or that of an interrupted download"),
        ("Qwen/Qwen3-tiny", "qwen", "", "must be new, empty, or that of an interrupted download"),
        ("two/Sets", "two", "", None),
        ("odd/Escapes", "f", "", "index.json must name files such as model-00001-of-00002.safetensors, got '../../x."),
        ("odd/Numbers", "g", "", "index.json must be JSON whose weight_map names files, got TypeError"),
        ("odd/Deep", "h", "", "index.json must be JSON whose weight_map names files, got RecursionError"),
        ("shaky/Breaks", "shaky", "", "Downloading shaky/Breaks failed"),
        ("shaky/Breaks", "shaky", "", None),
    ]
    results = download(endpoint, tmp_path, *(each[:3] for each in wanted))
    for (name, folder, _, message), (code, error) in zip(wanted, results, strict=True):
        assert (name, folder, code) == (name, folder, 0 if message is None else 1), error
        assert message is None or (message in error and "Traceback" not in error), error
    unwanted = {"original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "picture.png"}
    for folder in (tmp_path / "qwen", tmp_path / "gated", tmp_path / "shaky"):
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == {name: data for name, data in QWEN.items() if name not in unwanted}
    assert sorted(path.name for path in (tmp_path / "two").glob("*.safetensors*")) == ["model.safetensors"]
    assert not any((tmp_path / folder).exists() for folder in "ace")


def test_download_without_network_is_an_error(tmp_path: Path) -> None:
    ((code, error),) = download("http://127.0.0.1:9", tmp_path, ("Qwen/Qwen3-tiny", "qwen", ""))
    assert (code, "Downloading Qwen/Qwen3-tiny failed" in error) == (1, True)


@pytest.mark.parametrize("folder", ["s3://bucket/qwen", "gs://b", "hf://Qwen/x", "file:///tmp/x", "S3:/bucket"])
def test_download_to_a_remote_folder_is_rejected_and_creates_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from titan_models.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["download", "Qwen/Qwen3-tiny", "--to", folder]) == 1
    assert "The folder to download to must be a local path, got " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_download_without_huggingface_hub_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from titan_models.__main__ import main

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["download", "Qwen/Qwen3-tiny", "--to", str(tmp_path / "qwen")]) == 1
    assert "pip install titan-models[download]" in capsys.readouterr().err
