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
def test_any_chunking_equals_plain_cross_entropy_in_value_and_gradients(chunk_tokens):
    head, hidden, targets = example()
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets["labels"].flatten(), reduction="sum")
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])
    total, count = CrossEntropy.Config(chunk_tokens=chunk_tokens).build()(head, hidden, targets)
    assert count == 18
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(total, [hidden, head.weight]), expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


def test_no_more_than_a_chunk_of_logits_is_ever_made_at_once():
    head, hidden, targets = example()
    made = []
    total, _ = CrossEntropy.Config(chunk_tokens=5).build()(lambda h: made.append(len(h)) or head(h), hidden, targets)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        total, _ = CrossEntropy.Config(chunk_tokens=5).build()(head, hidden, targets)
    total.backward()
    assert max(made) <= 5
    assert max(saved, default=0) < 5 * 50


def test_the_count_is_that_of_the_labels_that_count():
    _, _, targets = example()
    assert int(CrossEntropy.Config().build().count(targets)) == 18


def test_all_labels_ignored_give_zero():
    head, hidden, targets = example()
    targets["labels"].fill_(-100)
    total, count = CrossEntropy.Config().build()(head, hidden, targets)
    assert (total.item(), count.item()) == (0.0, 0)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="chunk_tokens 0"):
        CrossEntropy.Config(chunk_tokens=0).build()


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_a_z_loss_is_added_where_gradients_are_taken(chunk_tokens):
    head, hidden, targets = example()
    logits = head(hidden)[targets["labels"] != -100]
    plain = F.cross_entropy(logits, targets["labels"][targets["labels"] != -100], reduction="sum")
    expected = plain + 0.1 * logits.exp().sum(-1).log().square().sum()
    loss = CrossEntropy.Config(chunk_tokens=chunk_tokens, z_loss=0.1).build()
    total, _ = loss(head, hidden, targets)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden)[0], rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(loss(head, hidden, targets)[0], plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("z_loss", [-1e-4, float("nan"), float("inf")])
def test_a_z_loss_without_meaning_is_refused(z_loss):
    with pytest.raises(ConfigError, match="z_loss"):
        CrossEntropy.Config(z_loss=z_loss).build()
