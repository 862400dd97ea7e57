"""The demo's model: size, causality, and that it learns."""

import math

import pytest
import torch

from trainctl.trainer.demo.__main__ import SIZES
from trainctl.trainer.demo.model import GPT, VOCABULARY, ModelConfig

TINY = ModelConfig(layers=2, width=16, heads=2, context=12, dropout=0.0)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_size_has_between_one_and_about_three_million_parameters(size: str) -> None:
    layers, width, heads, context = SIZES[size]
    model = GPT(ModelConfig(layers=layers, width=width, heads=heads, context=context))
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3.5e6


def test_an_untrained_model_guesses_evenly() -> None:
    torch.manual_seed(0)
    inputs = torch.randint(VOCABULARY, (4, 12))
    loss = GPT(TINY)(inputs, inputs)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_no_position_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    inputs = torch.randint(VOCABULARY, (1, 12))
    changed = inputs.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % VOCABULARY
    before, after = model.logits(inputs), model.logits(changed)
    assert before.shape == (1, 12, VOCABULARY)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(layers=1, width=16, heads=2, context=12, dropout=0.5))
    inputs = torch.randint(VOCABULARY, (1, 12))
    assert not torch.equal(model.logits(inputs), model.logits(inputs))
    model.eval()
    assert torch.equal(model.logits(inputs), model.logits(inputs))


def test_it_learns_a_sentence_by_heart() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    text = torch.tensor(list(b"def main():\n\n"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(text[None, :-1], text[None, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"layers": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_a_shape_that_cannot_be_built_is_refused(wrong: dict[str, float]) -> None:
    shape = {"layers": 1, "width": 16, "heads": 2, "context": 8} | wrong
    with pytest.raises(ValueError, match=r"heads|at least 1|dropout"):
        ModelConfig(**shape)
