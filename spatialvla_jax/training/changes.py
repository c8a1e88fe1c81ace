"""Changes of what training does, which a run that an earlier version began reports when it goes on."""

# Oldest first. A run's metadata says how many there were when it began.
CHANGES = (
    "augmented images are clipped to [0, 1] after the change of brightness, too, as in the release (augment.enabled)",
    "episodes without language are left out in every dataset, unless its spec says skip_unlabeled=False",
    "a gripper outside [0, 1] and actions that are not finite are faults of their episodes (data.faults)",
    "new runs scale a dimension by minimum and maximum where 98 % of the frames share a value; this run keeps its "
    "statistics",
    "gradients of linear layers are rounded otherwise in their last bits, those of adapters (lora.rank) come from "
    "products of their rank",
)


def describe_changes(known: int) -> str:
    """What changed since there were `known` changes, "" if nothing did."""
    return "; ".join(f"({number}) {change}" for number, change in enumerate(CHANGES[known:], 1))
