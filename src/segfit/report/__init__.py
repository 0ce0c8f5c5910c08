"""What the person sees: console, TensorBoard, pictures, files."""
