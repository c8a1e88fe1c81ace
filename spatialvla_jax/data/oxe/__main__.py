"""`python -m spatialvla_jax.data.oxe` prints the catalogue as a Markdown table."""

from spatialvla_jax.data.oxe.catalogue import CATALOGUE
from spatialvla_jax.data.oxe.mixtures import MIXTURES
from spatialvla_jax.data.oxe.spec import DatasetSpec


def table() -> str:
    """A row per dataset: robot, episodes, weight in the published mixture, camera, depth."""
    weights = dict(MIXTURES["oxe_spatial_vla_plus"])
    lines = ["| dataset | robot | episodes | weight | intrinsics | depth |", "|---|---|---:|---:|---|---|"]
    for name, spec in CATALOGUE.items():
        episodes = f"{spec.episodes:,}" if spec.episodes else "–"
        weight = f"{weights[name]:.4g}" if name in weights else "–"
        lines.append(f"| `{name}` | {spec.robot} | {episodes} | {weight} | {spec.camera} | {_depth(spec)} |")
    return "\n".join(lines)


def _depth(spec: DatasetSpec) -> str:
    if spec.depth:
        return "yes"
    return "stored, not read" if spec.unread_depth else "no"


if __name__ == "__main__":
    print(table())
