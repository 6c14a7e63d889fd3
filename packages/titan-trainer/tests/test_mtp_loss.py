import pytest
import torch
import torch.nn.functional as F
from titan_config import ConfigError
from titan_trainer import CrossEntropy, MultiTokenPredictionLoss
from torch import nn


def example():
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=False).double()
    hidden = torch.randn(3, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    targets = {name: torch.randint(50, (3, 7)) for name in ("labels", "next_labels")}
    targets["labels"][0, :2] = targets["next_labels"][:, -2:] = -100
    return head, hidden, targets


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_mtp_loss_adds_the_weighted_second_token_and_counts_labels_of_the_first(chunk_tokens, weight):
    head, hidden, targets = example()
    main_loss, mtp_loss = (
        F.cross_entropy(head(hidden[:, index]).flatten(0, 1), targets[name].flatten(), reduction="sum")
        for index, name in enumerate(targets)
    )
    expected = main_loss + weight * mtp_loss
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])
    loss = MultiTokenPredictionLoss.Config(loss=CrossEntropy.Config(chunk_tokens=chunk_tokens), weight=weight).build()
    total, count = loss(head, hidden, targets)
    assert count == loss.count(targets) == 19
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for actual, expected_grad in zip(torch.autograd.grad(total, [hidden, head.weight]), expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, rtol=1e-11, atol=1e-13)


def test_a_batch_without_next_labels_has_the_loss_of_the_next_token():
    head, hidden, targets = example()
    plain = {"labels": targets["labels"]}
    assert MultiTokenPredictionLoss.Config().build()(head, hidden[:, 0], plain) == CrossEntropy.Config().build()(
        head, hidden[:, 0], plain
    )


def test_a_negative_weight_is_rejected():
    with pytest.raises(ConfigError, match=r"MTP loss weight must be at least 0, got -0\.1\."):
        MultiTokenPredictionLoss.Config(weight=-0.1).build()
