"""What LeRobot does before and after the policy: the export's own processor does the rest."""

# LeRobot is installed where this runs.
# pyright: reportMissingImports=false

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.factory import make_policy_processor_pipelines

from lerobot_policy_spatialvla.configuration_spatialvla import SpatialVLAConfig


def make_spatialvla_pre_post_processors(
    config: SpatialVLAConfig, dataset_stats: dict[str, Any] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """`dataset_stats` are those of a LeRobot dataset; the export has its own."""
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device or "cpu"),
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
