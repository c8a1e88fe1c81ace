"""Changes in training behaviour, reported when a run that started with an earlier version resumes."""

# Oldest first. A run's metadata stores how many there were when it started.
CHANGES = (
    "augmented images are clipped to [0, 1] after the brightness change too, as in the release (augment.enabled)",
    "episodes without language are skipped in every dataset, unless its spec says skip_unlabeled=False",
    "a gripper outside [0, 1] and actions that are not finite are faults of their episodes (data.faults)",
    "new runs scale a dimension by minimum and maximum if 98 % of the frames share a value; this run keeps its "
    "statistics",
    "gradients of linear layers differ in their last bits; those of adapters (lora.rank) are computed from products "
    "of their rank",
)


def describe_changes(known: int) -> str:
    """The changes after the first `known` ones, as text; "" if there are none."""
    return "; ".join(f"({number}) {change}" for number, change in enumerate(CHANGES[known:], 1))
