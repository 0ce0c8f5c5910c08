"""What a run shows and writes: console, TensorBoard, files."""
