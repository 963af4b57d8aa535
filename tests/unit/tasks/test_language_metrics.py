import math

import numpy as np
import pytest
import torch
from torchmetrics.text import Perplexity as TheirPerplexity
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_prune.tasks import CausalLM
from lightning_prune.tasks.token_metrics import IGNORED, score_tokens, token_metrics
from tests.unit.tasks import tiny_language as tiny


def batches():
    """Batches of 21, 10, 2 and no tokens that count."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for rows, width, ignored in ((3, 7, 0), (4, 5, 10), (1, 6, 4), (2, 2, 4)):
        labels = torch.randint(0, 9, (rows, width), generator=draw)
        hidden = torch.randperm(rows * width, generator=draw)[:ignored]
        labels.view(-1)[hidden] = IGNORED
        found.append((3 * torch.randn(rows, width, 9, generator=draw), labels))
    return found


def oracle(data):
    """Every token by itself, in 64 bits."""
    nats, correct = [], []
    for logits, labels in data:
        for scores, label in zip(
            logits.double().numpy().reshape(-1, 9), labels.numpy().ravel(), strict=True
        ):
            if label != IGNORED:
                nats.append(-math.log(np.exp(scores[label]) / np.exp(scores).sum()))
                correct.append(scores.argmax() == label)
    return np.mean(nats), np.mean(correct), len(nats)


def test_every_token_counts_once_whatever_the_batches():
    metrics = token_metrics(prefix="val/")
    for logits, labels in batches():
        found = score_tokens(logits, labels)
        metrics.update(nats=found.nats, correct=found.correct, tokens=found.tokens)
    loss, accuracy, count = oracle(batches())
    assert count == 33
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == {
        "val/loss": pytest.approx(loss, rel=1e-6),
        "val/perplexity": pytest.approx(math.exp(loss), rel=1e-6),
        "val/accuracy": pytest.approx(accuracy, rel=1e-6),
    }
    theirs = TheirPerplexity(ignore_index=IGNORED)
    for logits, labels in batches():
        theirs.update(logits, labels)
    assert values["val/perplexity"] == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert metrics.state_dict() == {}


def test_a_mean_of_batches_would_be_another_number():
    means = [float(score_tokens(*batch).loss) for batch in batches()[:3]]
    assert np.mean(means) != pytest.approx(oracle(batches())[0], rel=1e-2)


def test_sums_are_exact_over_very_many_batches():
    metrics = token_metrics(prefix="")
    many, one = torch.tensor(1e8), torch.tensor(1)
    metrics.update(nats=many, correct=one, tokens=torch.tensor(10**8))
    for _ in range(1000):
        metrics.update(nats=torch.tensor(0.5), correct=one, tokens=torch.tensor(0))
    # In 32 bits alone 1e8 + 0.5 is 1e8.
    expected = torch.tensor((1e8 + 500) / 1e8)
    assert torch.equal(metrics.compute()["loss"], expected)
    assert expected > 1


def test_nothing_that_counts_is_no_loss_and_no_gradient():
    logits = torch.randn(1, 2, 9, requires_grad=True)
    loss = score_tokens(logits, torch.full((1, 2), IGNORED)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()
    metrics = token_metrics(prefix="")
    none = torch.tensor(0)
    metrics.update(nats=none.float(), correct=none, tokens=none)
    assert all(math.isnan(value) for value in metrics.compute().values())


@pytest.mark.parametrize("config", [tiny.GPT2, tiny.LLAMA], ids=lambda c: c["model_type"])
def test_the_loss_of_a_causal_model_is_that_of_transformers(config):
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    module = CausalLM(network)
    ids = torch.randint(0, 9, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.where(mask.bool(), IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = network(**batch).loss
    assert torch.allclose(module.score(batch).loss, expected, rtol=1e-6)
