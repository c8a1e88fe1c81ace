"""Demonstrations recorded in simulators with scripted experts."""

from spatialvla_jax.sim.record_libero import TaskReport, record_libero, render_motions

__all__ = ["TaskReport", "record_libero", "render_motions"]
