# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Llama 3.1 8B, pretrained on C4: 8 GPUs of 80 GiB or more.

torchrun --nproc-per-node 8 recipes/llama3_8b.py --tokenizer.path /path/to/tokenizer.model
"""

from pathlib import Path

from titan_ckpt import Checkpointer
from titan_data import HuggingFaceSource, TiktokenTokenizer, TokenLoader
from titan_models import Decoder, Flex, llama3
from titan_parallel import Compile, SelectiveActivationCheckpoint
from titan_trainer import AdamW, Trainer, Training, Validator, WarmupStableDecay, main


def llama3_tokenizer() -> TiktokenTokenizer.Config:
    """Return the config of Meta's `tokenizer.model`, with the special tokens that a base model needs."""
    names = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}
    return TiktokenTokenizer.Config(
        path=Path("tokenizer.model"), special_tokens=names, bos="<|begin_of_text|>", eos="<|end_of_text|>"
    )


def c4(split: str) -> HuggingFaceSource.Config:
    """Return the English part of C4: the training split is streamed, the validation split (0.8 GB) downloaded once."""
    if split == "train":
        return HuggingFaceSource.Config(path="allenai/c4", name="en", split=split)
    files = "hf://datasets/allenai/c4/en/c4-validation.*.json.gz"  # loaded by name, `datasets` downloads all splits
    return HuggingFaceSource.Config(path="json", data_files=files, streaming=False)


C4_TOKENS = 150e9
"""Approximate number of tokens of C4's training split; each recipe trains for one epoch."""


def llama3_run(
    model: Decoder.Config, *, global_batch_size: int, lr: float, seq_len: int = 8192, warmup_steps: int = 2000
) -> Trainer.Config:
    """Return the config that the large recipes share: one epoch of C4, with attention within documents (flex).

    Sources: learning rates and cosine decay from "The Llama 3 herd of models" (2024), table 3 and section 3.4.1;
    min_lr_factor 0.1 and 2000 warm-up steps from DeepSeek-V3 and Megatron-Bridge; betas, weight decay and clipping as
    in docs/concepts/defaults.md.
    """
    steps = 1000 * round(C4_TOKENS / (global_batch_size * seq_len) / 1000)
    for block in model.blocks():
        block.attention.core = Flex.Config()
    return Trainer.Config(
        model=model,
        tokenizer=llama3_tokenizer(),
        dataloader=TokenLoader.Config(source=c4("train"), add_bos=True, add_eos=True, shuffle=False),
        training=Training(global_batch_size=global_batch_size, local_batch_size=1, seq_len=seq_len, steps=steps),
        optimizer=AdamW.Config(lr=lr),
        lr_scheduler=WarmupStableDecay.Config(
            warmup_steps=warmup_steps, total_steps=steps, decay_type="cosine", min_lr_factor=0.1
        ),
        activation_checkpoint=SelectiveActivationCheckpoint.Config(),
        compile=Compile.Config(),
        validator=Validator.Config(
            dataloader=TokenLoader.Config(
                source=c4("validation"), add_bos=True, add_eos=True, shuffle=False, infinite=False
            ),
            interval=500,
            tokens=10_000_000,
        ),
        checkpoint=Checkpointer.Config(interval=500),
    )


def llama3_8b() -> Trainer.Config:
    """Return the config: 1 million tokens per step, 143,000 steps.

    Learning rate: the paper's 3e-4 for 4 million tokens per step, divided by the square root of 4.
    """
    config = llama3_run(llama3.llama3_8b(), global_batch_size=128, lr=1.5e-4)
    config.training.local_batch_size = 2
    config.dump_folder = Path("outputs/llama3_8b")
    return config


if __name__ == "__main__":
    main(llama3_8b)
