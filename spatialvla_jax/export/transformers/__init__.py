"""The PyTorch model and processor: files that are written into every export and import nothing of this package."""
