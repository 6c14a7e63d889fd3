"""Cross-entropy on whole logits and on logits sharded over the vocabulary."""

from __future__ import annotations

import pytest
import torch
from titan_parallel import cross_entropy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F


def random_logits(dtype, vocab=11):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(2, 5, vocab, generator=generator, dtype=torch.float64) * 30).to(dtype)
    labels = torch.randint(vocab, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = -100
    return logits, labels


def reference(logits, labels, z_loss=0.0):
    logits = logits.double().clone().requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss + z_loss * sum(row.exp().sum().log() ** 2 for row in logits[labels != -100])
    loss.backward()
    return loss.detach(), logits.grad


def split(logits, num_ranks, rank):
    """Return this rank's shard of the logits along the vocabulary, and the whole logits as a DTensor."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    local = logits.chunk(num_ranks, -1)[rank].contiguous().requires_grad_()
    whole = DTensor.from_local(local, mesh, [Shard(2)], run_check=False, shape=logits.shape, stride=logits.stride())
    return local, whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_split_logits_give_the_loss_and_gradient_of_whole_ones(run_ranks, dtype):
    logits, labels = random_logits(dtype)
    expected, expected_grad = reference(logits, labels)

    def on_rank():
        rank = torch.distributed.get_rank()
        local, whole = split(logits, 3, rank)  # parts of 4, 4 and 3
        loss = cross_entropy(whole, labels)
        (loss * 2).backward()
        return loss.detach(), local.grad / 2

    results = run_ranks(3, on_rank)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for loss, _ in results:  # losses are of some 10 to 100, summed in `wide` over 10 tokens and 11 logits
        torch.testing.assert_close(loss, expected.to(wide), rtol=64 * torch.finfo(wide).eps, atol=0)
    gathered = torch.cat([grad for _, grad in results], -1)
    assert gathered.dtype == dtype
    # probabilities in `wide` of logits up to 100, whose exp has an error of 100 units; then rounded to `dtype`
    error = (gathered.double() - expected_grad).abs().max()
    assert error <= torch.finfo(dtype).eps + 400 * torch.finfo(wide).eps


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_whole_logits_are_summed_in_fp32_or_wider(dtype, wide):
    logits, labels = random_logits(dtype)
    loss = cross_entropy(logits, labels)
    assert loss.dtype == wide
    torch.testing.assert_close(loss, reference(logits, labels)[0].to(wide))


def test_labels_with_a_custom_ignore_index_are_ignored(run_ranks):
    logits, labels = random_logits(torch.float64)
    labels[labels == -100] = 7
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=7)
    torch.testing.assert_close(cross_entropy(logits, labels, ignore_index=7), expected)
    on_rank = lambda: cross_entropy(split(logits, 2, torch.distributed.get_rank())[1], labels, ignore_index=7).detach()  # noqa: E731
    for loss in run_ranks(2, on_rank):
        torch.testing.assert_close(loss, expected)


def test_no_valid_label_gives_zero():
    logits, labels = random_logits(torch.float32)
    for z_loss in (0.0, 0.1):
        assert cross_entropy(logits, torch.full_like(labels, -100), z_loss=z_loss) == 0


def test_a_z_loss_is_added_on_whole_and_on_split_logits(run_ranks):
    logits, labels = random_logits(torch.float64)
    expected, expected_grad = reference(logits, labels, z_loss=0.1)
    plain = logits.clone().requires_grad_()
    loss = cross_entropy(plain, labels, z_loss=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.grad, expected_grad, rtol=0, atol=1e-11)

    def on_rank():
        local, whole = split(logits, 3, torch.distributed.get_rank())
        loss = cross_entropy(whole, labels, z_loss=0.1)
        loss.backward()
        return loss.detach(), local.grad

    results = run_ranks(3, on_rank)
    for loss, _ in results:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], -1), expected_grad, rtol=0, atol=1e-11)


def test_a_label_beyond_the_vocabulary_fails_on_every_rank(run_ranks):
    logits, labels = random_logits(torch.float32)
    labels[0, 0] = 11

    def on_rank():
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            cross_entropy(split(logits, 2, torch.distributed.get_rank())[1], labels)
        return True

    assert run_ranks(2, on_rank) == [True, True]


def test_the_loss_without_its_sum_over_the_vocabulary_is_wrong(run_ranks):
    logits, labels = random_logits(torch.float64)

    def on_rank():
        import titan_parallel.tensor_parallel.vocab_parallel_loss  # noqa: F401, the module and not the function of that name

        module = __import__("sys").modules["titan_parallel.tensor_parallel.vocab_parallel_loss"]
        module.all_reduce = lambda tensor, operation, group_name: tensor
        return cross_entropy(split(logits, 2, torch.distributed.get_rank())[1], labels).detach()

    for loss in run_ranks(2, on_rank):
        assert abs(loss - reference(logits, labels)[0]) > 1
