"""`check_parallel` of models of transformers on every kind of mesh, with the roles that the models declare."""

from __future__ import annotations

import json

import pytest
from titan_config import ConfigError
from titan_parallel import FullActivationCheckpoint, check_parallel
from titan_parallel.__main__ import main
from titan_parallel.check import meshes

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}
WINDOWS = {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma3": ("Gemma3Text", WINDOWS),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"embedding_multiplier": 5.0, "residual_multiplier": 0.3, "logits_scaling": 3.0}),
    "gpt2": ("GPT2", {"n_inner": 48}),
}
TWO_RANKS = ("fsdp2", "tp2", "tp2_sp", "cp2_gather", "cp2_ulysses", "cp2_ring", "pp2")
FOUR_RANKS = (
    *("fsdp4", "fsdp2_tp2", "fsdp2_tp2_sp", "tp4_sp", "cp4_gather", "cp4_ulysses", "cp4_ring"),
    *("fsdp2_cp2", "cp2_tp2_sp", "pp2_tp2", "pp2_tp2_sp", "pp2_cp2"),
)
BY_DEFAULT = ("llama, tied", "gemma3")


def builder(model: str):
    name, changes = MODELS[model]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    return lambda: transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model", [m if m in BY_DEFAULT else pytest.param(m, marks=pytest.mark.full) for m in MODELS])
def test_a_model_matches_the_single_process_on_two_ranks(model):
    report = check_parallel(builder(model), meshes(*TWO_RANKS), steps=1)
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
def test_a_model_matches_the_single_process_on_four_ranks(model):
    report = check_parallel(
        builder(model), meshes(*FOUR_RANKS), steps=2, activation_checkpoint=FullActivationCheckpoint.Config()
    )
    assert report.ok, report


def test_a_model_that_cannot_be_split_is_rejected_with_the_reason():
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="alibi"):
        check_parallel(lambda: transformers.BloomForCausalLM(config), meshes("tp2"))


def test_the_model_of_a_config_file_is_checked_with_reduced_sizes(tmp_path, capsys):
    config = transformers.MistralConfig(sliding_window=4096)  # 7 billion parameters
    tmp_path.joinpath("config.json").write_text(config.to_json_string(use_diff=False))
    assert main(["check", "--hf", str(tmp_path), "--mesh", "fsdp2", "tp2_sp", "--steps", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)["meshes"]) == ["fsdp2", "tp2_sp"]
    assert "hidden_size 4096 -> 64" in printed.err and "sliding_window 4096 -> 6" in printed.err


def test_a_file_that_is_not_a_language_model_config_is_rejected(tmp_path, capsys):
    path = tmp_path / "config.json"
    for text in ("{}", "no json", '{"model_type": "vit"}', '{"model_type": "nothing"}'):
        path.write_text(text)
        assert main(["check", "--hf", str(path), "--mesh", "fsdp2"]) == 2, text
        assert "must be the config.json of a causal language model" in capsys.readouterr().err
