"""A small byte-level GPT: pre-norm blocks, learned positions, GELU, causal attention by PyTorch's fused kernel."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Raises `ValueError` for one that cannot be built."""

    layers: int
    width: int
    heads: int
    context: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.context) < 1:
            raise ValueError(f"layers, width, heads and context are at least 1, not {self}")
        if self.width % self.heads:
            raise ValueError(f"the width {self.width} is not a multiple of the {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability in [0, 1), not {self.dropout}")


class GPT(nn.Module):
    """Predicts the next byte. `forward(inputs, targets)` takes two int64 tensors (batch, time), returns the mean loss.

    The loss is in nats per byte; a uniform guess has ln 256 = 5.55.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(VOCABULARY, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: 0.02 everywhere, smaller where a projection writes into the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith("out.weight") else 0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(inputs)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores of the next byte, (batch, time, 256)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        stream: Tensor = self.dropout(self.token_embedding(inputs) + self.position_embedding(positions))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.attention_norm(stream))
        updated: Tensor = stream + self.feed_forward(self.feed_forward_norm(stream))
        return updated


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        batch, time, width = stream.shape
        query, key, value = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(stream).split(width, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attention_dropout if self.training else 0.0, is_causal=True
        )
        projected: Tensor = self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, time, width)))
        return projected


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.out = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.out(functional.gelu(self.up(stream), approximate="tanh")))
        return projected
