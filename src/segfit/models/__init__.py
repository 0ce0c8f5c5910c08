"""Models: plain arguments in, logits (B, num_classes, H, W) out."""
