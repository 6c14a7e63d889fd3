"""Hugging Face weight folders as found in practice: one set of weights is read, anything invalid is one error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from titan_ckpt import Checkpointer, CheckpointError, Renamed, load_hf, save_hf
from titan_config import Configurable
from torch import nn

NAMES = ("a", "b", "c")


class Names:
    """Maps each weight to a tensor of the same name."""

    def mappings(self):
        return [Renamed(name, name) for name in NAMES]

    def find(self, stored, config):
        return self.mappings()

    def hf_config(self):
        return {"model_type": "toy", "bos_token_id": None, "eos_token_id": None}


class Toy(Configurable, nn.Module):
    class Config(Configurable.Config):
        def hf_adapter(self):
            return Names()

    def __init__(self, config=None):
        nn.Module.__init__(self)
        for number, name in enumerate(NAMES):
            self.register_parameter(name, nn.Parameter(torch.full((2, 3), float(number))))


class Run(Configurable):
    class Config(Configurable.Config):
        model: Toy.Config = Toy.Config()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4000000000\n"


def folder_with(tmp_path, *others):
    """Create an index with three shards, and the files `others` with weights of another value."""
    folder = tmp_path / "hf"
    save_hf(Toy().state_dict(), Names(), folder, max_file_bytes=24)
    for name in others:
        save_file({name: torch.full((2, 3), 7.0) for name in NAMES}, folder / name)
    return folder


def loaded(path):
    model = Toy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1)
    load_hf(path, model.state_dict(), Names())
    return [parameter[0, 0].item() for parameter in model.parameters()]


def assert_rejected(path, match):
    model = Toy()
    with pytest.raises(CheckpointError, match=match) as error:
        load_hf(path, model.state_dict(), Names())
    assert [parameter[0, 0].item() for parameter in model.parameters()] == [0, 1, 2], "nothing changes"
    return str(error.value)


def test_two_sets_of_weights_are_rejected_unless_one_is_selected(tmp_path):
    folder = folder_with(tmp_path, "model.safetensors")
    message = assert_rejected(
        folder, r"must contain one set of weights, got model\.safetensors\.index\.json and model\.safetensors"
    )
    assert f"pass {folder}/model.safetensors.index.json or {folder}/model.safetensors instead" in message
    assert loaded(folder / "model.safetensors") == [7, 7, 7]
    assert loaded(folder / "model.safetensors.index.json") == [0, 1, 2]
    settings = Checkpointer.Config(initial_load_path=folder / "model.safetensors", initial_load_in_hf=True)
    model = Toy()
    checkpointer = settings.build(dump_folder=tmp_path / "run", config=Run.Config())
    checkpointer.load({"model": model})
    checkpointer.close()
    assert model.a[0, 0].item() == 7
    assert (tmp_path / "run/checkpoint/base-model/config.json").is_file()


@pytest.mark.parametrize(
    "beside",
    [
        *(["consolidated.safetensors"], ["consolidated.00.safetensors"], ["model.fp32.safetensors"]),
        *(["model.fp32-00001-of-00002.safetensors", "model.fp32-00002-of-00002.safetensors"],),
        *(["model-00001-of-00001.fp16.safetensors"], ["model-00003-of-00004.safetensors"]),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_other_layouts_and_stale_shards_are_not_a_second_set(tmp_path, beside, single, caplog):
    """The weights that transformers loads are loaded; a stale shard is a warning, or an error without an index."""
    folder = folder_with(tmp_path, *beside)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    stale = "00004" in beside[0]
    if single:
        for path in [*folder.glob("model-*-of-00003.safetensors"), folder / "model.safetensors.index.json"]:
            path.unlink()
        save_file({name: torch.full((2, 3), 5.0) for name in NAMES}, folder / "model.safetensors")
    if single and stale:
        assert_rejected(
            folder, r"must contain all files model-\*-of-00004\.safetensors, got model-00003-of-00004\.safetensors"
        )
    else:
        assert loaded(folder) == ([5, 5, 5] if single else [0, 1, 2])
        assert ("Ignoring model-00003-of-00004.safetensors, which" in caplog.text) == stale


@pytest.mark.parametrize(
    ("others", "both"),
    [
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            r"index\.json and model-\*-of-00002",
        ),
        (["adapter_model.safetensors"], r"index\.json and adapter_model\.safetensors"),
    ],
)
def test_complete_sets_of_other_names_are_a_second_set(tmp_path, others, both):
    assert_rejected(folder_with(tmp_path, *others), f"must contain one set of weights, got model.safetensors.{both}")


def test_transformers_loads_the_other_of_two_sets(tmp_path):
    """The reason to reject two sets: an index would select one, while transformers loads the single file."""
    transformers = pytest.importorskip("transformers", reason="the reference of this test")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="1KB")
    state = {}
    for path in sorted(tmp_path.glob("model-*.safetensors")):
        state |= load_file(path)
    single = {name: tensor + 1 for name, tensor in state.items()}
    save_file(single, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(theirs["model.norm.weight"], single["model.norm.weight"])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", DEEP, "config.json must be a JSON object, got RecursionError"),
        ("config.json", f'{{"a": {DEEP}}}', "config.json must be a JSON object, got RecursionError"),
        ("config.json", '{"vocab_size": ' + "9" * 5000 + "}", "config.json must be a JSON object, got ValueError"),
        ("config.json", '{"model_type": "toy", "model_type": "x"}', "the key 'model_type' is duplicated"),
        ("config.json", '{"rope": {"a": 1, "a": 1}}', "the key 'a' is duplicated"),
        ("config.json", '{"rms_norm_eps": NaN}', "the number NaN is not finite"),
        ("config.json", '{"rope_theta": [-Infinity]}', "the number -Infinity is not finite"),
        ("config.json", '{"rope_theta": 1e999}', "the number 1e999 is not finite"),
        ("config.json", '{"a": "\udcff"}', "config.json must be a JSON object, got UnicodeDecodeError"),
        (
            "model.safetensors.index.json",
            DEEP,
            "a JSON object with the object weight_map, got RecursionError",
        ),
        ("config.json", LFS, r"config\.json must be a JSON object, got a Git LFS pointer\."),
        ("model.safetensors.index.json", LFS, r"the object weight_map, got a Git LFS pointer\."),
        ("model.safetensors.index.json", "[1]", r"the object weight_map, got a list\."),
        ("model.safetensors.index.json", "null", r"the object weight_map, got a NoneType\."),
        ("model.safetensors.index.json", '{"metadata": {}}', r"the object weight_map, got none\."),
        ("model.safetensors.index.json", '{"weight_map": []}', r"got a weight_map of type list\."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' is duplicated"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../x.safetensors"}}',
            "plain file names of its own folder, got '../",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "/etc/passwd"}}',
            "plain file names of its own folder, got '/etc",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', r"/hf/\.\. must be a complete"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "sub/x.safetensors"}}',
            "plain file names of its own folder",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x\\u0000"}}', "plain file names of its own folder"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "gone.safetensors"}}',
            "gone.safetensors must be",
        ),
    ],
)
def test_invalid_json_is_one_error(tmp_path, name, text, message):
    folder = folder_with(tmp_path)
    (folder / name).write_text(text, errors="surrogateescape")
    if name != "config.json":
        for path in folder.glob("model-*"):
            path.unlink()
    assert len(assert_rejected(folder, message)) < 1000


def test_a_git_lfs_pointer_instead_of_weights_is_reported(tmp_path):
    (tmp_path / "model.safetensors").write_text(LFS)
    assert_rejected(tmp_path, r"must be a complete safetensors file, got a Git LFS pointer\. Run `git lfs pull`")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling link"])
def test_special_files_are_rejected_without_blocking(tmp_path, name, kind):
    folder = folder_with(tmp_path)
    (folder / name).unlink()
    make = {"folder": Path.mkdir, "fifo": os.mkfifo, "dangling link": lambda path: path.symlink_to("nothing")}
    make[kind](folder / name)
    assert_rejected(folder, "must be a regular file|must be a complete")


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": '
TWICE += b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


@pytest.mark.parametrize(
    ("header", "length"),
    [
        *(({"a": entry(0, 8), "b": entry(4, 12)}, None), ({"a": entry(0, 80, [20])}, None)),
        *(({"a": entry(0, 8, dtype="F64")}, None), ({"a": entry(-8, 0)}, None), ({"a": entry(0, 8, [2**62, 4])}, None)),
        *(({"a": entry(0, 8)}, 2**63), ({"a": entry(0, 8)}, 10**8), ({"a": "x"}, None), ([1], None), (TWICE, None)),
        (b"[" * 100_000, None),
    ],
)
def test_headers_that_do_not_fit_their_file_are_rejected(tmp_path, header, length):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    count = len(text) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(count.to_bytes(8, "little") + text + bytes(8))
    assert_rejected(tmp_path, r"model\.safetensors must be a complete safetensors file")


def test_each_weight_is_widened_separately_and_none_is_rounded(tmp_path):
    dtypes = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16}
    stored = {name: torch.rand(2, 3).to(dtype) for name, dtype in dtypes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    model = Toy()
    load_hf(tmp_path, model.state_dict(), Names())
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"2 of a dtype that would be rounded: b .*float32, here .*bfloat16\), c "
    ):
        load_hf(tmp_path, Toy().bfloat16().state_dict(), Names())


def test_remote_folders_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("s3://bucket/x"), Path("file:///tmp/x")):
        with pytest.raises(CheckpointError, match="The export folder must be a local path, got "):
            save_hf(Toy().state_dict(), Names(), path)
        with pytest.raises(CheckpointError, match="The folder of Hugging Face weights must be a local path, got "):
            load_hf(path, Toy().state_dict(), Names())
    assert not any(tmp_path.iterdir())


def test_non_finite_weights_are_reported_by_name(tmp_path, caplog):
    for dtype, values in ((torch.float32, (torch.nan, 3e38)), (torch.bfloat16, (-torch.inf, 1.0))):
        state = {name: torch.ones(2, 3, dtype=dtype) for name in NAMES}
        state["b"][1, 1], state["c"][0, 0] = values
        save_file(state, tmp_path / "model.safetensors")
        caplog.clear()
        loaded(tmp_path)
        assert caplog.messages == [f"Weights must be finite, got NaN or infinity in b of {tmp_path}."]


def begin(tmp_path, source):
    settings = Checkpointer.Config(initial_load_path=source, initial_load_in_hf=True)
    checkpointer = settings.build(dump_folder=tmp_path / "run", config=Run.Config())
    try:
        checkpointer.load({"model": Toy()})
    finally:
        checkpointer.close()
    return tmp_path / "run" / "checkpoint" / "base-model"


def test_a_link_out_of_the_folder_is_not_copied(tmp_path):
    folder = folder_with(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json must be a file in its folder .* got a link to .*secret"
    ):
        begin(tmp_path, folder)
    with pytest.raises(CheckpointError, match="must be a file in its folder"):
        save_hf(Toy().state_dict(), Names(), tmp_path / "out", tokenizer=folder)
    (folder / "tokenizer.json").unlink()
    (folder / "real.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("real.json")  # a link inside the folder is allowed
    assert (begin(tmp_path, folder) / "tokenizer.json").read_text() == "{}"


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    """In the cache, snapshots/REVISION/NAME is a link to blobs/HASH, for weights too."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/5f3e", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    source = folder_with(tmp_path)
    (source / "tokenizer.json").write_text('{"version": 1}')
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert loaded(folder) == [0, 1, 2]
        kept = begin(tmp_path, folder)
        assert (kept / "tokenizer.json").read_text() == '{"version": 1}'
        assert not (kept / "tokenizer.json").is_symlink()
    (tmp_path / "secret").write_text("{}")
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab\.json must be a file in its folder or in the Hugging Face cache"):
        begin(tmp_path, snapshot)


def test_token_ids_come_from_the_tokenizer_folder_if_there_is_no_base_model(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 6, "content": "<end>"}]}))
    settings = {
        "eos_token": "<end>",
        "bos_token": {"content": "<s>"},
        "added_tokens_decoder": {"5": {"content": "<s>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_hf(Toy().state_dict(), Names(), tmp_path / "a", tokenizer=folder)
    told = json.loads((tmp_path / "a/config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (5, 6)
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    save_hf(Toy().state_dict(), Names(), tmp_path / "b", tokenizer=folder)
    assert json.loads((tmp_path / "b/generation_config.json").read_text())["eos_token_id"] == [6, 7]
    base = tmp_path / "a"  # the base model has priority
    save_hf(Toy().state_dict(), Names(), tmp_path / "c", tokenizer=folder, base_model=base)
    assert json.loads((tmp_path / "c/config.json").read_text())["eos_token_id"] == 6


def test_a_config_cannot_execute_a_file_of_the_current_folder(tmp_path, monkeypatch):
    """`python -m` puts the current folder first on Python's path."""
    executes = "print('EXECUTED')\nfrom titan_config import Configurable\nclass X(Configurable): pass\n"
    (tmp_path / "titan_theirs.py").write_text(executes)
    (tmp_path / "titan_ft").mkdir()
    (tmp_path / "titan_ft/__init__.py").write_text(executes)
    paths = [
        "titan_theirs:X.Config",
        "titan_ft:X.Config",
        "titan_ckpt.format.durable_files:os.system",
        "titan_ckpt.__main__:X",
        7,
    ]
    for number, path in enumerate(paths):
        monkeypatch.setattr("titan_ckpt.checkpointer.to_dict", lambda config, path=path: {"model": {"$type": path}})
        checkpointer = Checkpointer.Config(interval=1).build(dump_folder=tmp_path / str(number), config=Run.Config())
        checkpointer.save(6, {"model": Toy()}, last=True)
        checkpointer.close()
    script = "from titan_ckpt.__main__ import main\n"
    script += "for n in range(5): print(main(['export-hf', f'{n}/checkpoint/step-6', 'out']))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, ''); exec({script!r})"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1"] * 5
    assert result.stderr.count("must contain a model with an adapter, got") == 5
    assert "titan_ft must be an installed package" in result.stderr
    assert not (tmp_path / "out").exists()
