"""The PyTorch model and processor: files that are written into every export. They only use `utils/camera.py` of this
package, which is written beside them."""
