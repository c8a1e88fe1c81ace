"""Demonstrations recorded in simulators with scripted experts."""

from spatialvla_jax.data.record.libero import TaskReport, record_libero, render_motions

__all__ = ["TaskReport", "record_libero", "render_motions"]
