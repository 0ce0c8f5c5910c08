"""Seeds for everything random, each a function of its purpose."""

import hashlib
import os
import random

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed, a function of `parts` alone on every machine and version."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's global generators; `deterministic`: use such CUDA kernels where they exist."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True
