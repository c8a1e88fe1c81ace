from helpers.checkpoints import checkpoint, golden, processor  # noqa: F401
