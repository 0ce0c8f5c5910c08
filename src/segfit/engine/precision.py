"""Which precision runs on a device, and its autocast and GradScaler."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from segfit.system.hardware import cpu_has_bf16


@dataclass(frozen=True)
class Precision:
    """The precision of training on one device."""

    name: str  # "fp32", "bf16" or "fp16"
    device_type: str  # "cpu", "cuda" or "mps"

    @property
    def dtype(self) -> torch.dtype:
        """The type in which matrix products and convolutions run."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass; it does nothing in fp32."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self, init_scale: float, growth_interval: int) -> torch.amp.GradScaler:
        """Return the gradient scaler; disabled (every call passes through) outside fp16."""
        return torch.amp.GradScaler(
            self.device_type,
            init_scale=init_scale,
            growth_interval=growth_interval,
            enabled=self.name == "fp16",
        )


def native_precisions(device: torch.device) -> list[str]:
    """Return the precisions that the device has native arithmetic for, the best one for training first."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return ["bf16", "fp16", "fp32"]
        return ["fp16", "fp32"] if convolves_in_fp16(device) else ["fp32"]
    return ["bf16", "fp32"] if device.type == "cpu" and cpu_has_bf16() else ["fp32"]


@cache
def convolves_in_fp16(device: torch.device) -> bool:
    """Return whether fp16 convolutions are finite: on GTX 16xx, cuDNN's are NaN (pytorch issue 77955). Synchronises."""
    images = torch.ones(2, 64, 32, 32, dtype=torch.float16, device=device)
    kernel = torch.full((64, 64, 3, 3), 1e-3, dtype=torch.float16, device=device)
    layouts = torch.contiguous_format, torch.channels_last
    made = [F.conv2d(images.contiguous(memory_format=one), kernel, padding=1) for one in layouts]
    return bool(torch.stack(made).isfinite().all())


def resolve_precision(requested: str, device: torch.device) -> tuple[Precision, str | None]:
    """Return the precision that runs for "auto", "fp32", "fp16" or "bf16", and a notice if it is not the requested one."""
    native = native_precisions(device)
    chosen = native[0] if requested not in native else requested
    reason = f"this {device.type.upper()} has no native {requested}"
    nan = device.type == "cuda" and "fp16" not in native
    if nan:
        reason = "fp16 convolutions of this card give NaN, as known of GTX 16xx"
    notice = f"precision={requested}: {reason}; running in {chosen} instead."
    visible = requested != chosen and (requested != "auto" or nan)
    return Precision(chosen, device.type), notice if visible else None


def set_tf32(allowed: bool) -> None:
    """Allow TF32 (10 bits of mantissa) in fp32 matrix products and convolutions on CUDA, or not."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
