# SPDX-License-Identifier: Apache-2.0
"""A frozen Llama read with fewer passes over memory than the model's own `forward`; the same numbers up to rounding.

Scoring a small model is bound by memory, not by products: norms are one kernel, and sums are part of the product before them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM


def hidden_states(model: LlamaForCausalLM, ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """What the head reads, (rows · tokens, width). ids, places: (rows, tokens); mask: (rows, 1, tokens, tokens), added.

    For a model with as many key heads as query heads, and under inference mode.
    """
    body, config = model.model, model.config
    (rows, tokens), width, eps = ids.shape, config.hidden_size, config.rms_norm_eps
    x = body.embed_tokens(ids)
    cosine, sine = (part.unsqueeze(2) for part in body.rotary_emb(x, places))
    x = x.view(-1, width)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = rms_norm(x, (width,), layer.input_layernorm.weight, eps)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear(y, p.weight).view(rows, tokens, -1, attention.head_dim) for p in projections)
        q, k = _turned(q, cosine, sine), _turned(k, cosine, sine)
        seen = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        x = torch.addmm(x, seen.transpose(1, 2).reshape(-1, width), attention.o_proj.weight.mT)
        y = rms_norm(x, (width,), layer.post_attention_layernorm.weight, eps)
        inner = silu(linear(y, mlp.gate_proj.weight), inplace=True).mul_(linear(y, mlp.up_proj.weight))
        x = torch.addmm(x, inner, mlp.down_proj.weight.mT)
    return rms_norm(x, (width,), body.norm.weight, eps)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of x, (rows, tokens, heads, head_dim)."""
    half = x.shape[-1] // 2
    found = x * cosine
    found[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-1)
    found[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return found
