"""SegFit: segmentation training that fits the GPU you have."""

__version__ = "0.1.0"
