from helpers.checkpoints import checkpoint, golden, processor, reads  # noqa: F401
