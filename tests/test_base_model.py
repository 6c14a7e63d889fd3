"""An export of a fine-tuned model keeps what training does not change of the model it began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from titan_ckpt import Checkpointer, CheckpointError, export_hf, export_model, save_hf
from titan_ckpt.__main__ import main

EOS = [3, 8, 9]
GENERATION = {"bos_token_id": 1, "eos_token_id": EOS, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
EXTRA = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "problem_type": "chat"}


def base_model(config, folder: Path) -> Path:
    """A folder as an instruct model is released: three tokens end a text."""
    model = config.model.build()
    model.init_weights(seed=3)
    save_hf(model.state_dict(), config.model.hf_adapter(), folder)
    stated = json.loads((folder / "config.json").read_text())
    stated |= EXTRA | {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 4, "initializer_range": 0.006}
    stated |= {"torch_dtype": "float32", "auto_map": {"AutoConfig": "other.Config"}, "quantization_config": {}}
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE.txt", "notes.md"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def run(run_ranks):
    """Train in a process of its own: a process group would not survive the forks of later tests."""

    def run_one(config, **changes) -> None:
        config.checkpoint = Checkpointer.Config(async_mode="disabled", **changes)
        run_ranks(1, lambda: config.build().train())

    return run_one


def exported(folder: Path) -> tuple[dict, dict]:
    """Judged by transformers: what it reads of an export."""
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    read = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return read, transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()


def assert_keeps_all(folder: Path) -> None:
    config, generation = exported(folder)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, EOS, 4)
    assert {key: generation[key] for key in GENERATION} == GENERATION
    assert config["id2label"] == {0: "no", 1: "yes"}
    assert (config["problem_type"], config["initializer_range"]) == ("chat", 0.006)
    stated = json.loads((folder / "config.json").read_text())
    assert not stated.keys() & {"auto_map", "quantization_config", "torch_dtype"}
    names = {path.name for path in folder.iterdir()} - {"config.json", "generation_config.json"}
    assert {name for name in names if not name.startswith("model")} == {
        *("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE.txt")
    }


def test_what_training_does_not_change_is_kept_after_a_resume_and_without_the_folder(small_run, run, tmp_path, capsys):
    changes = {"training.steps": 1}
    base = base_model(small_run(changes=changes), tmp_path / "base")
    first = small_run(changes=changes)
    run(first, initial_load_path=base, initial_load_in_hf=True, last_save_in_hf=True)
    checkpoints = first.dump_folder / "checkpoint"
    assert_keeps_all(checkpoints / "step-1-hf")
    shutil.rmtree(base)
    run(small_run(changes={"training.steps": 2}), last_save_in_hf=True)  # resumed, and not told of the base model
    assert_keeps_all(checkpoints / "step-2-hf")
    assert main(["export-hf", str(checkpoints / "step-2"), str(tmp_path / "later")]) == 0
    assert_keeps_all(tmp_path / "later")

    alone = export_model(checkpoints / "step-2", tmp_path / "alone")
    export_hf(alone, tmp_path / "from-alone")
    assert_keeps_all(tmp_path / "from-alone")
    run(small_run("next", changes), initial_load_path=alone, last_save_in_hf=True)  # a run of Titan that began with it
    assert_keeps_all(tmp_path / "next" / "checkpoint" / "step-1-hf")

    shutil.copytree(checkpoints / "step-1", tmp_path / "moved" / "step-1")  # whose base model is gone
    with pytest.raises(CheckpointError, match=r"base model of the run must exist for its token ids .* --base-mo"):
        export_hf(tmp_path / "moved" / "step-1", tmp_path / "refused")
    command = ["export-hf", str(tmp_path / "moved" / "step-1"), str(tmp_path / "told"), "--base-model"]
    assert main([*command, str(tmp_path / "later")]) == 0
    assert_keeps_all(tmp_path / "told")
    assert main(["export-hf", str(alone), str(tmp_path / "x"), "--base-model", str(tmp_path / "none")]) == 1
    assert "The folder of the base model must exist" in capsys.readouterr().err


def test_without_a_base_model_the_ids_are_those_of_the_tokenizer(small_run, run, tmp_path):
    """Whatever the size of the vocabulary, here that of Llama 3."""
    config = small_run(changes={"training.steps": 1, "model.vocab_size": 128_256, "model.dim": 16})
    run(config, last_save_in_hf=True)
    checkpoints = config.dump_folder / "checkpoint"
    assert main(["export-hf", str(checkpoints / "step-1"), str(tmp_path / "later")]) == 0
    for folder in (checkpoints / "step-1-hf", tmp_path / "later"):
        stated, generation = exported(folder)
        assert (stated["bos_token_id"], stated["eos_token_id"]) == (None, config.tokenizer.build().eos_id)
        assert generation["eos_token_id"] == 2047


def test_a_fresh_run_in_the_folder_of_another_forgets_its_base_model(small_run, run, tmp_path):
    config = small_run(changes={"training.steps": 1})
    base = base_model(config, tmp_path / "base")
    run(config, initial_load_path=base, initial_load_in_hf=True)
    assert (config.dump_folder / "checkpoint" / "base-model").is_dir()
    shutil.rmtree(config.dump_folder / "checkpoint" / "step-1")
    again = small_run(changes={"training.steps": 1})
    run(again, last_save_in_hf=True)
    assert json.loads((config.dump_folder / "checkpoint/step-1-hf/config.json").read_text())["eos_token_id"] == 2047
    with pytest.raises(CheckpointError, match=r"must be the one that initialized the run, got .* with hidden_size 32"):
        other = small_run(changes={"model.dim": 32})
        export_hf(again.dump_folder / "checkpoint/step-1", tmp_path / "x", base_model=base_model(other, tmp_path / "o"))
