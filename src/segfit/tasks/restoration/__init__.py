"""Image restoration: degraded pictures in, clean ones out."""
