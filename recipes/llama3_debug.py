# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A Llama 3 of 6 million parameters, trained on novels by Jane Austen on a CPU in about a minute.

torchrun --nproc-per-node 2 recipes/llama3_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from titan_ckpt import Checkpointer
from titan_data import JsonlSource, TiktokenTokenizer, TokenLoader, unigram_entropy
from titan_models import llama3
from titan_trainer import AdamW, Trainer, Training, Validator, WarmupStableDecay, draw_loss_curve, main

ASSETS = Path(__file__).parent / "assets"


def llama3_debug() -> Trainer.Config:
    """Return the config of the run."""
    return Trainer.Config(
        model=llama3.llama3_debug(),
        tokenizer=TiktokenTokenizer.Config(
            path=ASSETS / "austen.tiktoken", special_tokens={"<|end_of_text|>": 2047}, eos="<|end_of_text|>"
        ),
        dataloader=TokenLoader.Config(source=JsonlSource.Config(path=ASSETS / "austen/train.jsonl"), add_eos=True),
        training=Training(
            global_batch_size=16, local_batch_size=8, seq_len=256, steps=40, mixed_precision_param="float32"
        ),
        optimizer=AdamW.Config(lr=3e-3),
        lr_scheduler=WarmupStableDecay.Config(warmup_steps=5),
        validator=Validator.Config(
            dataloader=TokenLoader.Config(
                source=JsonlSource.Config(path=ASSETS / "austen/validation.jsonl"),
                shuffle=False,
                infinite=False,
                add_eos=True,
            ),
            interval=20,
            tokens=8192,
        ),
        checkpoint=Checkpointer.Config(interval=20, keep_latest_k=2),
        dump_folder=Path("outputs/llama3_debug"),
    )


def report(trainer: Trainer) -> None:
    """Plot the loss with the unigram entropy of the text, and print the paths of the run's files."""
    folder, data = trainer.config.dump_folder, trainer.config.dataloader
    entropy = unigram_entropy(data.source.build(), trainer.tokenizer)
    draw_loss_curve(folder / "metrics.jsonl", folder / "loss.png", levels={"unigram entropy": entropy})
    print(f"unigram entropy of the text: {entropy:.4f} nats per token")
    for name in ("checkpoint", "metrics.jsonl", "config.json", "loss.png"):
        print(f"  {folder / name}")


if __name__ == "__main__":
    trainer = main(llama3_debug)
    if trainer.is_first_rank:
        report(trainer)
