"""Exact, faster forwards for transformers' SegFormer; derived and explained in docs/fast-segformer.md.

`use_fast(model)` gives the modules of a SegFormer subclasses of their own classes. Only `forward` is
overridden: parameters, buffers, hooks and state-dict keys stay what they are.

Features stay token-major throughout: a map `(B, C, H, W)` is a channels_last view of tokens
`(B, H·W, C)`, so that linear layers, norms, convolutions and resizing share one layout without copies.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.segformer import modeling_segformer as hf

from segfit.models.layers import (
    FastLinear,
    linear,
    relu_dropout_,
    resize,
    resize_and_sum,
    without_tf32,
)

_HAS_TRITON = find_spec("triton") is not None  # torch for Windows comes without


def to_tokens(x: Tensor) -> Tensor:
    """Return a channels_last map `(B, C, H, W)` as `(B, H, W, C)`: a view."""
    return x.permute(0, 2, 3, 1)


def to_map(x: Tensor) -> Tensor:
    """Return `(B, H, W, C)` as a channels_last map `(B, C, H, W)`: a view."""
    return x.permute(0, 3, 1, 2)


def on_pixels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a linear layer, weight `(D, C)`, makes of each pixel of a map `(B, C, H, W)`, channels last as x is."""
    return to_map(linear(to_tokens(x), weight, bias))


def fold(head: hf.SegformerDecodeHead, features: Sequence[Tensor]) -> list[Tensor]:
    """Return what the fused head adds up at 1/4 resolution: one `(B, D, h_i, w_i)` a stage.

    With P_i, b_i the projection of stage i and W_i its slice of the fusing 1×1 convolution, stage i adds
    W_i (P_i x_i + b_i). Either (W_i P_i) x_i or W_i (P_i x_i): whichever takes fewer products. Resizing
    keeps constants, so that the biases of all stages go to the last, which is the smallest.
    """
    maps: list[Tensor] = []
    for x, layer, weight in zip(
        features, head.linear_projections, fusing_weights(head), strict=True
    ):
        bias, projection = folded_bias(head) if x is features[-1] else None, layer.proj.weight
        if x.shape[1] < x.shape[0] * x.shape[2:].numel():
            maps.append(on_pixels(x, weight @ projection, bias))
        else:
            maps.append(on_pixels(on_pixels(x, projection), weight, bias))
    return maps


def fusing_weights(head: hf.SegformerDecodeHead) -> list[Tensor]:
    """Return the slice `(D, D)` of the fusing convolution that each stage meets, first stage first."""
    weight = head.linear_fuse.weight.flatten(1)
    # transformers joins the stages last to first
    return list(weight.chunk(len(head.linear_projections), dim=1))[::-1]


def folded_bias(head: hf.SegformerDecodeHead) -> Tensor:
    """Return Σ W_i b_i `(D,)`."""
    biases = torch.cat([p.proj.bias for p in reversed(head.linear_projections)])
    weight = head.linear_fuse.weight.flatten(1)
    exact = torch.promote_types(
        weight.dtype, biases.dtype
    )  # `HalfWeights` leaves what is frozen in fp32
    with torch.autocast(biases.device.type, enabled=False):  # CPUs multiply bf16 vectors slowly
        folded: Tensor = weight.to(exact) @ biases.to(exact)
    return folded


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return channels_last logits `(B, num_classes, h, w)` at `size`, contiguous as losses like them."""
    if torch.compiler.is_compiling() or logits.device.type != "cpu":
        return resize(logits.contiguous(), size)
    # On a CPU, resizing channels last and copying takes half the time; backward alike.
    full = resize(logits, size)
    if full.requires_grad:
        full.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
    return full.contiguous()


def kernels(maps: Sequence[Tensor], norm: nn.BatchNorm2d) -> Any:
    """Return `fused_head` if its kernels do what follows `fold` in training; None: products and torch's kernels do."""
    # A compiler fuses by itself; tensors without data (benchmark=plan) have no kernels; and which of two ways is
    # faster may change from run to run.
    if torch.compiler.is_compiling() or type(maps[0]) is not Tensor or not _HAS_TRITON:
        return None
    if maps[0].device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return None
    from segfit.models import fused_head

    return fused_head if fused_head.pay(maps, norm) else None


class FastDecodeHead(hf.SegformerDecodeHead):  # type: ignore[misc]
    """Projection, resizing, joining and fusing as one sum over stages; for inference batch norm, too."""

    def forward(self, encoder_hidden_states: Sequence[Tensor], **_: Any) -> Tensor:
        """Return logits `(B, num_classes, H/4, W/4)` of the stages' `(B, C_i, H/2^(i+2), …)`."""
        if not self.training and not torch.is_grad_enabled():
            return merged_logits(encoder_hidden_states, *merged_weights(self), self.classifier)
        maps = fold(self, encoder_hidden_states)
        p = self.dropout.p if self.training else 0.0
        if self.training and (fused := kernels(maps, self.batch_norm)):
            x = fused.sum_norm_relu_dropout(maps, self.batch_norm, p)
            return on_pixels(x, self.classifier.weight.flatten(1), self.classifier.bias)
        x = resize_and_sum(maps)
        del maps  # which nothing needs any more, and which are larger than their sum
        x, scale = relu_dropout_(self.batch_norm(x), p)
        # kept units grow by 1 / (1 - p); the classifier's weight is the smallest place to do it
        return on_pixels(x, self.classifier.weight.flatten(1) * scale, self.classifier.bias)


def merged_weights(head: hf.SegformerDecodeHead) -> tuple[list[Tensor], Tensor]:
    """Return one weight `(D, C_i)` a stage and one bias `(D,)`: projection, fusing and batch norm in eval mode."""
    norm = head.batch_norm
    with torch.autocast(norm.weight.device.type, enabled=False), without_tf32():
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        pairs = zip(fusing_weights(head), head.linear_projections, strict=True)
        weights = [(scale[:, None] * weight) @ p.proj.weight for weight, p in pairs]
        return weights, (folded_bias(head) - norm.running_mean) * scale + norm.bias


def merged_logits(
    features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor, classifier: nn.Conv2d
) -> Tensor:
    """Return logits `(B, num_classes, H/4, W/4)` of features by what `merged_weights` gave."""
    maps = [
        on_pixels(x, weight, bias if x is features[-1] else None)
        for x, weight in zip(features, weights, strict=True)
    ]
    return on_pixels(F.relu_(resize_and_sum(maps)), classifier.weight.flatten(1), classifier.bias)


class MergedDecodeHead(nn.Module):
    """Decode head for inference alone: the merged weights of another head, which is not changed, are all that it has."""

    def __init__(self, head: hf.SegformerDecodeHead) -> None:
        super().__init__()
        weights, bias = merged_weights(head)
        self.weights, self.bias = nn.ParameterList(weights), nn.Parameter(bias)
        self.classifier = head.classifier

    def forward(self, encoder_hidden_states: Sequence[Tensor], **_: Any) -> Tensor:
        """Return logits `(B, num_classes, H/4, W/4)` of the stages' `(B, C_i, H/2^(i+2), …)`."""
        return merged_logits(encoder_hidden_states, [*self.weights], self.bias, self.classifier)


def drop_paths(stages: Any, x: Tensor) -> list[dict[str, Any]]:
    """Return for each of a model's `FastStage` the factors of its blocks, of one draw for all; for stages that draw themselves, nothing.

    Each block's two branches are multiplied by a factor (B, 1, 1) each, 0 or 1 / (1 - p); there is none where p is 0. The
    draws are transformers' own, so that a seed drops the same blocks on both paths (on CUDA it draws others).
    """
    if not isinstance(stages[0], FastStage):
        return [{}] * len(stages)
    rates = [[getattr(b.drop_path, "drop_prob", 0) * b.training for b in s.blocks] for s in stages]
    chances = [[1 - rate for rate in own] for own in rates]  # 1 where a block is frozen
    twice = [chance for own in chances for chance in own for _ in range(2) if chance < 1]
    if not twice:
        return [{"factors": [()] * len(own)} for own in chances]
    kind, mixed = x.device.type, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype  # what a branch gives
    drawn = torch.rand((len(twice), len(x), 1, 1), dtype=dtype, device=x.device)
    torch._foreach_add_(drawn.unbind(), twice)
    torch._foreach_div_(drawn.floor_().unbind(), twice)
    pairs = iter(drawn.unflatten(0, (-1, 2)).unbind())
    return [{"factors": [next(pairs).unbind() if p < 1 else () for p in own]} for own in chances]


class FastStage(hf.SegformerStage):  # type: ignore[misc]
    """Stage whose output is a view of its tokens instead of a copy, and whose blocks are given what they drop."""

    def forward(
        self, hidden_states: Tensor, factors: Sequence[Sequence[Tensor]], **kwargs: Any
    ) -> Tensor:
        """Return `(B, C, H/stride, W/stride)`, channels last, of `(B, C', H, W)`; `factors` are those of `drop_paths`."""
        x, height, width = self.patch_embeddings(hidden_states)
        for block, own in zip(self.blocks, factors, strict=True):
            x = block(x, height, width, factors=own, **kwargs)
        tokens: Tensor = self.layer_norm(x)
        return to_map(tokens.unflatten(1, (height, width)))


class FastSequenceReduction(hf.SegformerSequenceReduction):  # type: ignore[misc]
    """Strided convolution of tokens as they lie, channels last, instead of a contiguous copy."""

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        """Return `(B, ⌊H/R⌋·⌊W/R⌋, C)` of tokens `(B, H·W, C)`."""
        tokens = hidden_states.unflatten(1, (height, width))
        reduced = to_tokens(self.sequence_reduction(to_map(tokens)))
        normed: Tensor = self.layer_norm(reduced.flatten(1, 2))
        return normed


class FastAttention(hf.SegformerAttention):  # type: ignore[misc]
    """Attention by torch's SDPA, or by two matrix products where those are faster."""

    def forward(
        self, hidden_states: Tensor, height: int, width: int, **_: Any
    ) -> tuple[Tensor, None]:
        """Return tokens `(B, N, C)` of tokens `(B, N, C)`, and no attention map."""
        reduced = hidden_states
        if self.sequence_reduction_ratio > 1:
            reduced = self.sequence_reduction(hidden_states, height, width)
        projected = self.q_proj(hidden_states), self.k_proj(reduced), self.v_proj(reduced)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        p = self.attention_dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            # the keys are few, and the backward of CPU flash attention is slow in bf16
            scores = q @ (k * self.scaling).transpose(-1, -2)
            x = F.dropout(scores.softmax(-1), p) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=self.scaling)
        return self.o_proj(x.transpose(1, 2).flatten(2)), None


class FastLayer(hf.SegformerLayer):  # type: ignore[misc]
    """Transformer block that adds residual and drop path in one operation."""

    def forward(
        self,
        hidden_states: Tensor,
        height: int,
        width: int,
        factors: Sequence[Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Return tokens `(B, H·W, C)` of tokens `(B, H·W, C)`; `factors` are its own of `drop_paths`."""
        x = hidden_states
        attended, _ = self.attention(self.layernorm_before(x), height, width, **kwargs)
        x = added(x, self.hidden_dropout(attended), *factors[:1])
        return added(x, self.mlp(self.layernorm_after(x), height, width), *factors[1:])


def added(residual: Tensor, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return `residual + factor · x`, `(B, N, C)`."""
    if factor is None:
        return residual + x
    with torch.autocast(x.device.type, enabled=False):  # which would copy both to fp32 on CUDA
        return torch.addcmul(residual, x, factor)


FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    hf.SegformerDecodeHead: FastDecodeHead,
    hf.SegformerStage: FastStage,
    hf.SegformerSequenceReduction: FastSequenceReduction,
    hf.SegformerAttention: FastAttention,
    hf.SegformerLayer: FastLayer,
    nn.Linear: FastLinear,
}


def use_fast(model: nn.Module) -> None:
    """Give every module of `model` that has one its faster class, in place."""
    for module in model.modules():
        module.__class__ = FAST_CLASSES.get(type(module), type(module))
