"""Weights are exported to Hugging Face format and imported bit for bit, sharded or not; `transformers` loads them."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from titan_ckpt import Checkpointer, CheckpointError, Renamed, export_hf, load_hf, save_hf
from titan_ckpt.__main__ import main
from titan_ckpt.hugging_face.folder_reader import HFReader
from titan_config import Configurable
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True)
class Made:
    """A mapping made of two functions."""

    own: list
    hf_names: list
    to_hf: Callable
    from_hf: Callable
    is_quantized: bool = False
    keeps_dtype: bool = False


class Renames:
    """Renames the weights of `Toy`, transposes one and stacks two."""

    def mappings(self):
        return [
            Renamed("first.weight", "hf.first"),
            Made([("second.weight", None)], ["hf.turned"], lambda own: own[0].t(), lambda theirs: [theirs[0].t()]),
            Made([("a", None), ("b", None)], ["hf.both"], torch.stack, lambda theirs: theirs[0].unbind()),
        ]

    def find(self, stored, config):
        return self.mappings()

    def hf_config(self):
        return {"model_type": "toy"}


class Toy(Configurable, nn.Module):
    class Config(Configurable.Config):
        dim: int = 6

        def hf_adapter(self):
            return Renames()

    def __init__(self, config):
        nn.Module.__init__(self)
        self.first = nn.Linear(config.dim, 5, bias=False)
        self.second = nn.Linear(5, config.dim, bias=False)
        self.a = nn.Parameter(torch.randn(3, 2))
        self.b = nn.Parameter(torch.randn(3, 2))


class Run(Configurable):
    class Config(Configurable.Config):
        model: Toy.Config = Toy.Config()


def toy(seed=1, dim=6):
    torch.manual_seed(seed)
    return Toy.Config(dim=dim).build()


def assert_equal(model, other):
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_live_model_is_exported_and_imported_again(tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf", max_file_bytes=120)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3, "a file holds at most max_file_bytes"
    assert index["metadata"]["total_size"] == 4 * (30 + 30 + 12)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {"model_type": "toy", "dtype": "float32"}
    model = toy(seed=2)
    load_hf(tmp_path / "hf", model.state_dict(), Renames())
    assert_equal(model, toy())


def test_bfloat16_weights_are_widened_and_never_rounded(tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf", dtype=torch.bfloat16)
    model = toy(seed=2)
    load_hf(tmp_path / "hf", model.state_dict(), Renames())
    assert torch.equal(model.first.weight, toy().first.weight.bfloat16().float())
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf32")
    with pytest.raises(CheckpointError, match=r"3 of a dtype that would be rounded: hf\.first"):
        load_hf(tmp_path / "hf32", toy().bfloat16().state_dict(), Renames())


def change(tmp_path, edit):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    state = load_file(path)
    edit(state)
    save_file(state, path)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("hf.both"), r"1 missing: hf\.both"),
        (
            lambda state: state.update({"hf.both": torch.zeros(2, 2, 2)}),
            r"hf\.both \(stored \[2, 2, 2\], here \[2, 3, 2\]\)",
        ),
        (lambda state: state.update({"hf.more": torch.zeros(1)}), r"1 unexpected: hf\.more"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_changes(tmp_path, edit, message):
    model = toy(seed=2)
    with pytest.raises(CheckpointError, match=message):
        load_hf(change(tmp_path, edit), model.state_dict(), Renames())
    assert_equal(model, toy(seed=2))


def test_unused_tensors_are_checked_before_any_weight_changes(tmp_path):
    class Ties(Renames):
        def find(self, stored, config):
            return [*self.mappings(), Made([], ["hf.tied", "hf.first"], None, self.compare)]

        def compare(self, theirs):
            if not torch.equal(*theirs):
                raise ValueError("They differ.")

    def repeat(state):
        state["hf.tied"] = state["hf.first"].clone()

    model = toy(seed=2)
    load_hf(change(tmp_path, repeat), model.state_dict(), Ties())
    assert_equal(model, toy())
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    save_file(load_file(path) | {"hf.tied": torch.zeros(5, 6)}, path)
    with pytest.raises(CheckpointError, match="They differ"):
        load_hf(tmp_path / "hf", toy(seed=2).state_dict(), Ties())


@pytest.mark.parametrize(
    ("mappings", "named"),
    [
        (lambda mappings: mappings[:2], "a, b missing"),
        (lambda mappings: [*mappings, Renamed("a", "hf.a")], "a missing, unexpected or duplicated"),
        (lambda mappings: [*mappings, Renamed("c", "hf.c")], "c missing, unexpected"),
    ],
)
def test_an_adapter_that_is_not_a_bijection_is_rejected(tmp_path, mappings, named):
    class Other(Renames):
        def mappings(self):
            return mappings(super().mappings())

    save_hf(toy().state_dict(), Renames(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=f"must map each weight of the model exactly once, got {named}"):
        load_hf(tmp_path / "hf", toy().state_dict(), Other())
    with pytest.raises(CheckpointError, match=f"must map each weight of the model exactly once, got {named}"):
        save_hf(toy().state_dict(), Other(), tmp_path / "other")


def test_an_export_never_overwrites_a_folder(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(CheckpointError, match="The export folder must not exist, got "):
        save_hf(toy().state_dict(), Renames(), tmp_path / "hf")


def test_a_folder_without_valid_weights_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match=r"must contain model\.safetensors"):
        load_hf(tmp_path, toy().state_dict(), Renames())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="with the object weight_map"):
        load_hf(tmp_path, toy().state_dict(), Renames())
    index.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a complete safetensors file"):
        load_hf(tmp_path, toy().state_dict(), Renames())


def checkpoint(folder, config=None, **settings):
    checkpointer = Checkpointer.Config(interval=1, **settings).build(dump_folder=folder, config=config)
    checkpointer.save(4, {"model": toy()}, last=True)
    checkpointer.close()
    return folder / "checkpoint" / "step-4"


def test_a_checkpoint_is_exported_without_building_the_model(tmp_path, capsys):
    export_hf(checkpoint(tmp_path), tmp_path / "hf", adapter=Renames())
    model = toy(seed=2)
    load_hf(tmp_path / "hf", model.state_dict(), Renames())
    assert_equal(model, toy())
    with pytest.raises(CheckpointError, match="must contain a config with the model's adapter, got none"):
        export_hf(checkpoint(tmp_path / "b"), tmp_path / "other")


def test_the_last_save_exports_the_weights_for_hugging_face(tmp_path):
    checkpoint(tmp_path, Run.Config(), last_save_in_hf=True, export_dtype="bfloat16")
    model = toy(seed=2)
    load_hf(tmp_path / "checkpoint" / "step-4-hf", model.state_dict(), Renames())
    assert torch.equal(model.a, toy().a.bfloat16().float())


def test_a_stopped_run_is_exported_only_with_export_when_stopped(tmp_path):
    for name, settings in {"plain": {}, "asked": {"export_when_stopped": True}}.items():
        config = Checkpointer.Config(last_save_in_hf=True, **settings)
        checkpointer = config.build(dump_folder=tmp_path / name, config=Run.Config())
        assert checkpointer.save(4, {"model": toy()}, last="stopped")
        checkpointer.close()
        assert (tmp_path / name / "checkpoint" / "step-4" / "manifest.json").exists()
        assert (tmp_path / name / "checkpoint" / "step-4-hf").exists() == (name == "asked")


def test_a_run_is_initialized_from_hugging_face_weights(tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf")
    settings = Checkpointer.Config(initial_load_path=tmp_path / "hf", initial_load_in_hf=True)
    model = toy(seed=2)
    assert settings.build(dump_folder=tmp_path / "run", config=Run.Config()).load({"model": model}) is None
    assert_equal(model, toy())


def test_an_export_contains_the_tokenizer_of_the_initial_weights(tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf")
    settings = {"initial_load_path": tmp_path / "hf", "initial_load_in_hf": True, "last_save_in_hf": True}
    checkpoint(tmp_path / "without", Run.Config(), **settings)
    assert not (tmp_path / "without" / "checkpoint" / "step-4-hf" / "tokenizer.json").exists()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    checkpoint(tmp_path / "run", Run.Config(), **settings)
    assert (tmp_path / "run" / "checkpoint" / "step-4-hf" / "tokenizer.json").read_text() == "{}"


def test_the_error_for_a_checkpoint_of_another_model_lists_different_settings(tmp_path):
    checkpoint(tmp_path, Run.Config())
    other = Run.Config(model=Toy.Config(dim=8))
    checkpointer = Checkpointer.Config().build(dump_folder=tmp_path, config=other)
    with pytest.raises(CheckpointError, match=r"model\.dim: 6 -> 8") as error:
        checkpointer.load({"model": toy(dim=8)})
    assert "model.first.weight (saved [5, 6], here [5, 8])" in str(error.value)


def test_the_command_line_lists_verifies_and_reports_damage(tmp_path, capsys):
    path = checkpoint(tmp_path)
    assert main(["list", str(tmp_path / "checkpoint")]) == 0
    assert main(["verify", str(path)]) == 0
    assert "step-4 is valid" in capsys.readouterr().out
    (path / "state.json").write_text("")
    assert main(["verify", str(path)]) == 1
    assert main(["export-hf", str(path), str(tmp_path / "hf")]) == 1
    assert "state.json" in capsys.readouterr().err


def test_sharded_models_are_exported_and_imported(run_ranks, tmp_path):
    def work(folder):
        model = toy()
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        save_hf(model.state_dict(), Renames(), folder / "hf", max_file_bytes=120)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        load_hf(folder / "hf", model.state_dict(), Renames())
        return {name: tensor.full_tensor().tolist() for name, tensor in model.state_dict().items()}

    expected = {name: tensor.tolist() for name, tensor in toy().state_dict().items()}
    assert run_ranks(2, work, tmp_path) == [expected] * 2
    model = toy(seed=2)
    load_hf(tmp_path / "hf", model.state_dict(), Renames())
    assert_equal(model, toy())


class LlamaNames:
    """An adapter for a model without transformers: the names of transformers with a prefix."""

    def __init__(self, names, config):
        self.names = names
        self.config = config

    def mappings(self):
        return [Renamed(f"my.{name}", name) for name in self.names]

    def find(self, stored, config):
        return self.mappings()

    def hf_config(self):
        return self.config


def test_transformers_loads_an_export_and_returns_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, architectures=["LlamaForCausalLM"]
    )
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    state = {f"my.{name}": tensor for name, tensor in reference.state_dict().items()}
    adapter = LlamaNames(reference.state_dict(), config.to_dict())
    save_hf(state, adapter, tmp_path / "hf", max_file_bytes=20_000)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)

    reference.save_pretrained(tmp_path / "theirs")
    emptied = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_hf(tmp_path / "theirs", emptied, adapter)
    assert all(torch.equal(emptied[name], state[name]) for name in state)


class Stack(Configurable, nn.Module):
    """A weight of four stacked matrices, each of which is a tensor in Hugging Face files."""

    class Config(Configurable.Config):
        pass

    def __init__(self, config=None):
        nn.Module.__init__(self)
        self.experts = nn.Parameter(torch.arange(40.0).view(4, 5, 2))
        self.norm = nn.Parameter(torch.arange(3.0))

    def mappings(self):
        def of(expert):
            return Made([("experts", expert)], [f"hf.{expert}"], lambda own: own[0], lambda theirs: theirs)

        return [Renamed("norm", "hf.norm"), *map(of, range(4))]

    def find(self, stored, config):
        return self.mappings()

    def hf_config(self):
        return {"model_type": "stack"}


def test_each_rank_reads_only_its_matrices_of_a_stacked_weight(run_ranks, tmp_path, monkeypatch):
    def work(folder):
        model = fully_shard(Stack(), mesh=init_device_mesh("cpu", (2,)))
        save_hf(model.state_dict(), Stack(), folder / "hf", max_file_bytes=120)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        reads = []
        read = HFReader.read
        monkeypatch.setattr(
            HFReader, "read", lambda self, mapping: reads.append(mapping.hf_names[0]) or read(self, mapping)
        )
        load_hf(folder / "hf", model.state_dict(), Stack())
        return reads, {name: tensor.full_tensor().tolist() for name, tensor in model.state_dict().items()}

    (first, weights), (second, same) = run_ranks(2, work, tmp_path)
    assert first == ["hf.norm", "hf.0", "hf.1"]
    assert second == ["hf.norm", "hf.2", "hf.3"]
    assert weights == same == {name: tensor.tolist() for name, tensor in Stack().state_dict().items()}


def test_pipeline_stages_read_only_their_weights(run_ranks, tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf")

    def work(folder, names):
        rank = torch.distributed.get_rank()
        model = toy(seed=2)
        stage = {name: tensor for name, tensor in model.state_dict().items() if name in names[rank]}

        class Stage:
            def state_dict(self):
                return stage

            def load_state_dict(self, state):
                pass

        settings = Checkpointer.Config(initial_load_path=folder / "hf", initial_load_in_hf=True)
        settings.build(dump_folder=folder / "run", config=Run.Config()).load({"model": Stage()})
        return {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    first, second = run_ranks(2, work, tmp_path, [["first.weight", "second.weight"], ["a", "b"]])
    loaded = {name: tensor.tolist() for name, tensor in toy().state_dict().items()}
    before = {name: tensor.tolist() for name, tensor in toy(seed=2).state_dict().items()}
    assert first == {name: (loaded if "weight" in name else before)[name] for name in loaded}
    assert second == {name: (before if "weight" in name else loaded)[name] for name in loaded}
    with pytest.raises(RuntimeError, match="must map each weight of the model exactly once, got b missing"):
        run_ranks(2, work, tmp_path, [["first.weight", "second.weight"], ["a"]])


class Quantized(Renames):
    """An adapter whose `first.weight` is dequantized and may be rounded, and whose `a` keeps its dtype."""

    def mappings(self):
        halved = Made([("first.weight", None)], ["hf.first"], None, lambda theirs: [theirs[0].float() / 3], True)
        kept = Renamed("a", "hf.a", keeps_dtype=True)
        return [halved, Renamed("second.weight", "hf.second"), kept, Renamed("b", "hf.b")]


def test_dequantized_weights_are_rounded_to_the_dtype_of_the_model(tmp_path):
    stored = {"hf.first": torch.randint(100, (5, 6)).to(torch.uint8)}
    stored |= {"hf.second": torch.rand(6, 5).bfloat16(), "hf.a": torch.rand(3, 2).bfloat16()}
    stored |= {"hf.b": torch.rand(3, 2).bfloat16()}
    save_file(stored, tmp_path / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        model = toy(seed=2).to(dtype)
        load_hf(tmp_path, model.state_dict(), Quantized())
        assert torch.equal(model.first.weight, (stored["hf.first"].float() / 3).to(dtype))


def test_weights_with_keeps_dtype_are_not_rounded_by_an_export(tmp_path):
    class Keeps(Renames):
        def mappings(self):
            names = {"first.weight": False, "second.weight": False, "a": True, "b": False}
            return [Renamed(name, name, keeps_dtype=keeps) for name, keeps in names.items()]

    save_hf(toy().state_dict(), Keeps(), tmp_path / "hf", dtype=torch.bfloat16)
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    stored = load_file(path)
    assert {name: tensor.dtype for name, tensor in stored.items() if name in "ab"} == {
        "a": torch.float32,
        "b": torch.bfloat16,
    }
    assert torch.equal(stored["a"], toy().a)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_contains_the_tokenizer_and_the_eos_tokens(tmp_path, monkeypatch):
    class Ends(Renames):
        def hf_config(self):
            return {"model_type": "toy", "bos_token_id": None, "eos_token_id": 7, "pad_token_id": None}

    (tmp_path / "from").mkdir()
    for name in ("tokenizer.json", "merges.txt", "README.md"):
        (tmp_path / "from" / name).write_text(name)
    export_hf(checkpoint(tmp_path), tmp_path / "hf", adapter=Ends(), tokenizer=tmp_path / "from")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "hf" / "merges.txt").is_file()
    assert not (tmp_path / "hf" / "README.md").exists()
    with pytest.raises(CheckpointError, match="must contain a tokenizer, got none"):
        save_hf(toy().state_dict(), Ends(), tmp_path / "other", tokenizer=tmp_path)
    path = checkpoint(tmp_path / "run", Run.Config())
    monkeypatch.setattr(
        "titan_ckpt.hugging_face.export.from_dict", lambda data: Toy.Config()
    )  # a test module is not imported
    assert main(["export-hf", str(path), str(tmp_path / "by-command"), "--tokenizer", str(tmp_path / "from")]) == 0
    assert (tmp_path / "by-command" / "tokenizer.json").is_file()


def complete_folder(tmp_path):
    save_hf(toy().state_dict(), Renames(), tmp_path / "hf", max_file_bytes=120)
    return tmp_path / "hf"


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: cut(folder / "model-00002-of-00003.safetensors", -1),
            "00002-of-00003.safetensors must be a",
        ),
        (
            lambda folder: cut(folder / "model-00002-of-00003.safetensors", 20),
            "00002-of-00003.safetensors must be a",
        ),
        (
            lambda folder: cut(folder / "model-00002-of-00003.safetensors", 0),
            "00002-of-00003.safetensors must be a",
        ),
        (
            lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(),
            "00003-of-00003.safetensors must be a",
        ),
        (lambda folder: cut(folder / "model.safetensors.index.json", -9), "with the object weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "with the object weight_map",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
            "must contain file names, got none",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
            "got a weight_map of type int",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"hf.first": null}}'),
            "must contain only file names",
        ),
        (lambda folder: cut(folder / "config.json", 5), "config.json must be a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json must be a JSON object, got a list"),
    ],
)
def test_damage_of_a_weight_folder_is_reported(tmp_path, damage, message):
    folder = complete_folder(tmp_path)
    damage(folder)
    model = toy(seed=2)
    with pytest.raises(CheckpointError, match=message):
        load_hf(folder, model.state_dict(), Renames())
    assert_equal(model, toy(seed=2))


def test_an_index_that_disagrees_with_its_files_is_rejected(tmp_path):
    folder = complete_folder(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    moved = {**index["weight_map"], "hf.both": index["weight_map"]["hf.first"]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"got hf\.both missing and none duplicated"):
        load_hf(folder, toy().state_dict(), Renames())
    fewer = {key: name for key, name in index["weight_map"].items() if key != "hf.both"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": fewer}))
    with pytest.raises(CheckpointError, match=r"1 missing: hf\.both"):
        load_hf(folder, toy().state_dict(), Renames())
    (folder / "model.safetensors.index.json").unlink()
    (folder / "again.safetensors").write_bytes((folder / index["weight_map"]["hf.both"]).read_bytes())
    with pytest.raises(CheckpointError, match=r"got none missing and hf\.both duplicated"):
        load_hf(folder, toy().state_dict(), Renames())


def test_the_adapter_can_reject_the_config_before_any_weight_changes(tmp_path):
    class Refuses(Renames):
        def find(self, stored, config):
            raise ValueError(f"must fit, got {config['model_type']} with {len(stored)} tensors.")

    model = toy(seed=2)
    with pytest.raises(CheckpointError, match="got toy with 3 tensors"):
        load_hf(complete_folder(tmp_path), model.state_dict(), Refuses())
    assert_equal(model, toy(seed=2))


def test_a_file_with_a_dtype_that_torch_lacks_is_rejected(tmp_path):
    header = b'{"hf.first": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_hf(tmp_path, toy().state_dict(), Renames())
