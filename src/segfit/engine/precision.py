"""Which precision runs on a device, and its autocast and GradScaler."""

from dataclasses import dataclass

import torch

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
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return ["bf16", "fp16", "fp32"] if ampere else ["fp16", "fp32"]
    return ["bf16", "fp32"] if device.type == "cpu" and cpu_has_bf16() else ["fp32"]


def resolve_precision(requested: str, device: torch.device) -> tuple[Precision, str | None]:
    """Return the precision that runs for "auto", "fp32", "fp16" or "bf16", and a notice if it is not the requested one."""
    native = native_precisions(device)
    chosen = native[0] if requested not in native else requested
    notice = f"precision={requested}: this {device.type.upper()} has no native {requested}; running in {chosen} instead."
    return Precision(chosen, device.type), notice if requested not in ("auto", chosen) else None


def set_tf32(allowed: bool) -> None:
    """Allow TF32 (10 bits of mantissa) in fp32 matrix products and convolutions on CUDA, or not."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
