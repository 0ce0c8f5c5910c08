"""torch.compile with a probe: what does not compile runs eager, and the person is told why."""

import torch
from torch import Tensor, nn

from segfit.engine.precision import Precision
from segfit.engine.task import Forward


def compiled_or_eager(
    model: nn.Module, example: Tensor, precision: Precision
) -> tuple[Forward, str | None]:
    """Return a compiled forward that was tried on `example`, or the model and the reason why not.

    Args:
        model: in training mode, on its device; its buffers and the generators of random numbers are restored.
        example: normalised images (B, 3, H, W) of the size that will be trained on.
        precision: of forward passes.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = [example.device] if example.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            forward: Forward = torch.compile(model)
            with precision.autocast():
                output = forward(example)
            output.float().sum().backward()
    except (
        Exception
    ) as error:  # the compiler fails in many ways (no Triton, no C++ compiler, its own bugs)
        torch._dynamo.reset()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return model, f"compile=true: torch.compile failed, running eager ({reason[:200]})."
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return forward, None
