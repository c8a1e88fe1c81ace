"""The PyTorch model and processor: files that are written into every export. Of this package they use `utils/camera.py`
alone, which is written beside them."""
