"""Forecasters of series: windows of columns in, the values that follow out."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.models.cnn import BatchNorm

EPSILON = 1e-5  # added to variances, as in RevIN: a window may be constant
TREND = 25  # steps of DLinear's moving average, as published
KNOWN_WIDTH = 32  # of the layer between what is known in advance and a step's values


class Forecaster(nn.Module):
    """Scales windows, forecasts by an encoder and a linear head, and scales back.

    Every target column is forecast by the same weights from its own past, beside which lie the other inputs and what is
    known in advance; so no target sees another, as in PatchTST (Nie et al., arXiv 2211.14730). With `mixed`, all targets
    make up one series. Values known of the step itself add to its forecast, by a small network.

    The columns of a window are scaled by their own past: with `revin` by mean and deviation (RevIN, Kim et al., ICLR 2022,
    without its affine layer); for NLinear, less the last value.
    """

    def __init__(
        self,
        options: Mapping[str, Any],  # the fields of the model's config
        *,
        lookback: int,
        horizon: int,
        channels: int,  # columns of the past, the targets first
        targets: int,
        known: int,  # columns known in advance, after the others
        quantiles: int,  # forecasts a value; 0: one, without a dimension of its own
    ) -> None:
        super().__init__()
        values = dict(options)
        name, mixed = values.pop("name"), values.pop("mixed", False)
        self.scaling = "revin" if values.pop("revin", False) else "none"
        columns = channels + known + (0 if mixed else 1 - targets)
        self.encoder: LSTMEncoder | TransformerEncoder | LinearEncoder
        if name == "lstm":
            self.encoder = LSTMEncoder(columns, **values)
        elif name == "transformer":
            self.encoder = TransformerEncoder(columns, lookback, **values)
        else:
            self.encoder = LinearEncoder(columns, lookback, **values)
            self.scaling = "none" if self.encoder.decompose else "last"
        self.horizon, self.channels, self.targets = horizon, channels, targets
        self.quantiles = quantiles
        self.width = targets if mixed else 1  # targets a series
        outputs = self.width * max(quantiles, 1)
        head = nn.Linear(self.encoder.features, horizon * outputs)
        self.head = nn.Sequential(nn.Dropout(values.get("dropout", 0.0)), head)
        self.known = (
            nn.Sequential(nn.Linear(known, KNOWN_WIDTH), nn.GELU(), nn.Linear(KNOWN_WIDTH, outputs))
            if known
            else None
        )

    def forward(self, window: Tensor) -> Tensor:
        """Return forecasts `(B, horizon, targets)` float32, or `(B, horizon, targets, quantiles)`.

        The window is `(B, lookback, channels)` float; with columns known in advance
        `(B, lookback + horizon, channels + known)`, of which the future of the first `channels` is not looked at.
        """
        past = window if self.known is None else window[:, : -self.horizon]
        # Columns before steps: what is done along the steps is several times faster.
        columns = past.float().transpose(1, 2).contiguous()
        values, extra = columns[:, : self.channels], columns[:, self.channels :]
        if self.scaling == "revin":
            variance, mean = torch.var_mean(values, 2, correction=0, keepdim=True)
            std = (variance + EPSILON).sqrt()
        else:
            std = torch.ones_like(values[..., :1])
            mean = values[..., -1:] if self.scaling == "last" else torch.zeros_like(std)
        values = (values - mean) / std
        own, other = values[:, : self.targets], values[:, self.targets :]
        groups = self.targets // self.width
        series = own.unflatten(1, (groups, self.width))
        if columns.shape[1] > self.targets:
            beside = torch.cat([other, extra], 1).unsqueeze(1).expand(-1, groups, -1, -1)
            series = torch.cat([series, beside], 2)
        features = self.encoder(series.flatten(0, 1).transpose(1, 2))
        outputs: Tensor = self.head(features).float()
        outputs = outputs.unflatten(1, (self.horizon, -1)).unflatten(0, (-1, groups))
        if self.known is not None:
            future = window[:, -self.horizon :, self.channels :]
            outputs = outputs + self.known(future).float().unsqueeze(1)
        # (B, groups, horizon, width · Q) → (B, horizon, targets, Q)
        outputs = outputs.transpose(1, 2).reshape(
            window.shape[0], self.horizon, self.targets, max(self.quantiles, 1)
        )
        own_mean, own_std = (part[:, None, : self.targets] for part in (mean, std))
        outputs = outputs * own_std + own_mean
        return outputs if self.quantiles else outputs[..., 0]


def patches(series: Tensor, size: int) -> Tensor:
    """Return `(N, lookback, columns)` in patches of `size` steps, `(N, ⌈lookback / size⌉, size · columns)`.

    Where they do not go into it, the first step is repeated in front.
    """
    missing = -series.shape[1] % size
    if missing:
        series = torch.cat([series[:, :1].expand(-1, missing, -1), series], 1)
    cut: Tensor = series.unflatten(1, (-1, size)).flatten(2)
    return cut


class LSTMEncoder(nn.Module):
    """The last state of an LSTM that reads steps, or patches of them as in SegRNN (Lin et al., arXiv 2308.11200).

    It reads `patch` steps at once, through a linear layer; 0: single ones.
    """

    def __init__(
        self, columns: int, hidden_size: int, num_layers: int, dropout: float, patch: int
    ) -> None:
        super().__init__()
        self.features = hidden_size
        self.patch = patch
        self.embed = nn.Linear(patch * columns, hidden_size) if patch else nn.Identity()
        self.lstm = nn.LSTM(
            hidden_size if patch else columns,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )

    def forward(self, series: Tensor) -> Tensor:
        """Return `(N, hidden_size)` of `(N, lookback, columns)`."""
        if self.patch:
            series = F.relu(self.embed(patches(series, self.patch)))
        states: Tensor = self.lstm(series)[0]
        return states[:, -1]


class TokenNorm(BatchNorm):
    """Batch norm over all tokens, `(N, tokens, width)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(input.flatten(0, 1)[..., None, None]).view_as(input)


class Block(nn.Module):
    """Self-attention and two linear layers, each followed by a norm; `(N, tokens, width)`."""

    def __init__(self, width: int, num_heads: int, dropout: float, norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        kind = TokenNorm if norm == "batch" else nn.LayerNorm
        self.norm1, self.norm2 = kind(width), kind(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        # (N, tokens, 3 · width) → three of (N, heads, tokens, width / heads)
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = self.norm1(tokens + self.dropout(self.project(attended)))
        tokens = self.norm2(tokens + self.dropout(self.mlp(tokens)))
        return tokens  # noqa: RET504


class TransformerEncoder(nn.Module):
    """A transformer whose tokens are patches that do not overlap, PatchTST (Nie et al., arXiv 2211.14730).

    `norm` is "batch", PatchTST's, with which the parts of an accumulated update differ from one big batch; or "layer".
    """

    def __init__(
        self,
        columns: int,
        lookback: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        patch: int,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        tokens = -(-lookback // patch)
        self.features = tokens * hidden_size
        self.patch = patch
        self.embed = nn.Linear(patch * columns, hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(hidden_size, num_heads, dropout, norm) for _ in range(num_layers))
        )

    def forward(self, series: Tensor) -> Tensor:
        """Return all tokens `(N, tokens · hidden_size)` of `(N, lookback, columns)`."""
        tokens = self.dropout(self.embed(patches(series, self.patch)) + self.positions)
        features: Tensor = self.blocks(tokens)
        return features.flatten(1)


class LinearEncoder(nn.Module):
    """The window itself, for a head that is the whole model: NLinear and DLinear (Zeng et al., arXiv 2205.13504).

    Of "dlinear", the moving average and what remains.
    """

    def __init__(self, columns: int, lookback: int, kind: str) -> None:
        super().__init__()
        self.decompose = kind == "dlinear"
        self.features = lookback * columns * (2 if self.decompose else 1)

    def forward(self, series: Tensor) -> Tensor:
        """Return `(N, features)` of `(N, lookback, columns)`."""
        if not self.decompose:
            return series.flatten(1)
        steps = series.transpose(1, 2)
        ends = F.pad(steps, (TREND // 2, TREND // 2), mode="replicate")
        trend = F.avg_pool1d(ends, TREND, stride=1)
        return torch.cat([trend, steps - trend], 1).flatten(1)
