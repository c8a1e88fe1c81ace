from spatialvla_jax.evaluation.open_loop import evaluate, predict

__all__ = ["evaluate", "predict"]
