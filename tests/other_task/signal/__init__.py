"""A task of another kind, for tests alone: noisy signals in, clean ones out."""
