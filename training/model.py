# SPDX-License-Identifier: Apache-2.0
"""A small Llama-architecture decoder whose parameter names are those of Hugging Face's LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOS = 256
EOS = 257


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model; the defaults are the shape of the embedded model."""

    vocab_size: int = 264
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1.0e6
    rms_norm_eps: float = 1.0e-5
    max_position_embeddings: int = 32768


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_dim] of integer positions [B, T], in the half-rotation layout.

    In float32 throughout, as Transformers computes them.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.float()[:, None, :, None] * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding: pairs are (i, i + head_dim / 2)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, t, _) = self.c, x.shape
        q = self.q_proj(x).view(b, t, c.num_attention_heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, c.num_key_value_heads, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and the last norm (`model.` in the checkpoint)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """The decoder with a head tied to the embedding."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.04, generator=generator)
        seed_induction(self, generator)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, last: int | None = None) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]; with `last`, of the last so many positions only."""
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None]
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        return self.decode(tokens, cos, sin, last)

    def decode(self, tokens: Tensor, cos: Tensor, sin: Tensor, last: int | None = None) -> Tensor:
        """As `forward`, with the rotary tables given."""
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        if last is not None:
            x = x[:, -last:]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


@torch.no_grad()
def seed_induction(model: Llama, generator: torch.Generator) -> None:
    """Start from an induction circuit instead of waiting for one to form.

    Dimension 0 of the residual stream is constant, the dimensions below half of the width hold the token, and the
    upper half is left free at first. Two heads of layer 0 attend one and two tokens back, by position alone, and
    write the token found there into the free half. One key/value head of layer 1 then looks for the places whose two
    preceding tokens are the current two, through slowly rotating pairs, and copies the token there to the output.
    Everything is trained on from there.
    """
    c = model.config
    width, head, pairs = c.hidden_size, c.head_dim, c.head_dim // 2
    half, code = width // 2, min(c.head_dim, width // 4)

    def orthonormal(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T

    embedding = model.model.embed_tokens.weight
    embedding[:, half:] = 0.0
    embedding[:, 1:half] *= 2.0**0.5
    embedding[:, 0] = 0.04 * width**0.5
    reader = torch.zeros(code, width)
    reader[:, 1:half] = orthonormal(code, half - 1)

    first = model.model.layers[0].self_attn
    frequency = c.rope_theta ** (-torch.arange(pairs) / pairs)
    fast = pairs // 4
    first.k_proj.weight[:head] = 0.0
    first.k_proj.weight[:fast, 0] = 0.8
    first.v_proj.weight[:head] = 0.0
    first.v_proj.weight[:code] = reader
    for h in range(2):
        angle = frequency[:fast] * (h + 1)
        block = first.q_proj.weight[h * head : (h + 1) * head]
        block[:] = 0.0
        block[:fast, 0] = 0.8 * angle.cos()
        block[pairs : pairs + fast, 0] = -0.8 * angle.sin()
        for i in range(code):
            first.o_proj.weight[half + h * code + i, h * head + i] = 0.1

    second = model.model.layers[1].self_attn
    query, key = torch.zeros(head, width), torch.zeros(head, width)
    one_back, two_back = torch.zeros(code, width), torch.zeros(code, width)
    one_back[:, half : half + code] = torch.eye(code)
    two_back[:, half + code : half + 2 * code] = torch.eye(code)
    slow = 5 * pairs // 16  # the slowest pairs compare the last token, as many before them the one before it
    for last, looked_for, found in ((pairs, reader, one_back), (pairs - slow, one_back, two_back)):
        mix = orthonormal(2 * slow, code)
        for part, offset in ((mix[:slow], 0), (mix[slow:], pairs)):
            query[offset + last - slow : offset + last] = 2.2 * part @ looked_for
            key[offset + last - slow : offset + last] = 2.2 * part @ found
    second.q_proj.weight[:head] = query
    second.k_proj.weight[:head] = key
    second.v_proj.weight[:head] = 0.0
    second.v_proj.weight[:code] = reader
    second.o_proj.weight[:, :code] = 0.25 * reader.T
