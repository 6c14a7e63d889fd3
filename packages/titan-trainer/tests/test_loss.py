import pytest
import torch
import torch.nn.functional as F
from titan_config import ConfigError
from titan_trainer import CrossEntropy
from torch import nn


def example(tokens: int = 21, vocab: int = 50):
    torch.manual_seed(0)
    head = nn.Linear(8, vocab, bias=False).double()
    hidden = torch.randn(3, tokens // 3, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocab, (3, tokens // 3))
    labels[0, :3] = -100
    return head, hidden, {"labels": labels}


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 21, 100])
def test_every_chunk_size_matches_plain_cross_entropy_in_value_and_gradients(chunk_tokens):
    head, hidden, targets = example()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets["labels"].flatten(), reduction="sum")
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])
    total, count = CrossEntropy.Config(chunk_tokens=chunk_tokens).build()(head, hidden, targets)
    assert count == 18
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for actual, expected_grad in zip(torch.autograd.grad(total, [hidden, head.weight]), expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, rtol=1e-11, atol=1e-13)


def test_logits_of_at_most_one_chunk_exist_at_once():
    head, hidden, targets = example()
    sizes = []
    total, _ = CrossEntropy.Config(chunk_tokens=5).build()(lambda h: sizes.append(len(h)) or head(h), hidden, targets)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        total, _ = CrossEntropy.Config(chunk_tokens=5).build()(head, hidden, targets)
    total.backward()
    assert max(sizes) <= 5
    assert max(saved, default=0) < 5 * 50


def test_count_is_the_number_of_valid_labels():
    _, _, targets = example()
    assert int(CrossEntropy.Config().build().count(targets)) == 18


def test_loss_and_count_are_zero_if_all_labels_are_ignored():
    head, hidden, targets = example()
    targets["labels"].fill_(-100)
    total, count = CrossEntropy.Config().build()(head, hidden, targets)
    assert (total.item(), count.item()) == (0.0, 0)


def test_chunk_tokens_of_zero_is_rejected():
    with pytest.raises(ConfigError, match=r"chunk_tokens must be at least 1.*got 0\."):
        CrossEntropy.Config(chunk_tokens=0).build()


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_z_loss_is_added_only_with_gradients_enabled(chunk_tokens):
    head, hidden, targets = example()
    logits = head(hidden)[targets["labels"] != -100]
    plain = F.cross_entropy(logits, targets["labels"][targets["labels"] != -100], reduction="sum")
    expected = plain + 0.1 * logits.exp().sum(-1).log().square().sum()
    loss = CrossEntropy.Config(chunk_tokens=chunk_tokens, z_loss=0.1).build()
    total, _ = loss(head, hidden, targets)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    (actual,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, hidden)[0], rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(loss(head, hidden, targets)[0], plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("z_loss", [-1e-4, float("nan"), float("inf")])
def test_invalid_z_loss_weights_are_rejected(z_loss):
    with pytest.raises(ConfigError, match="z_loss must be finite and at least 0"):
        CrossEntropy.Config(z_loss=z_loss).build()
