"""What training has come to do otherwise, so that a run of an earlier version says so when it goes on."""

# In the order of their making. A run's metadata hold how many there were.
CHANGES = (
    "augmented images are clipped to [0, 1] after the change of brightness, too, as in the release (augment.enabled)",
    "episodes without language are left out in every dataset, unless its spec says skip_unlabeled=False",
    "a gripper outside [0, 1] and actions that are not finite are faults of their episodes (data.faults)",
    "new runs scale a dimension by minimum and maximum where 98 % of the frames share a value; this run keeps its "
    "statistics",
)


def describe_changes(known: int) -> str:
    """What changed since there were `known` changes, "" if nothing did."""
    return "; ".join(f"({number}) {change}" for number, change in enumerate(CHANGES[known:], 1))
