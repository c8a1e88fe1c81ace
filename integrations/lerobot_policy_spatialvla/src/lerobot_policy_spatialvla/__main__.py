"""Write the directory that LeRobot's `--policy.path` takes: three small files that name an export.

python -m lerobot_policy_spatialvla EXPORT DIR [--unnorm_key=NAME] [--camera=NAME] [--gripper='[1,-1]'] …
"""

# LeRobot is installed where this runs.
# pyright: reportMissingImports=false

import sys
from pathlib import Path

import draccus

from lerobot_policy_spatialvla.configuration_spatialvla import SpatialVLAConfig
from lerobot_policy_spatialvla.modeling_spatialvla import load_processor
from lerobot_policy_spatialvla.processor_spatialvla import make_spatialvla_pre_post_processors


def main() -> None:
    if len(sys.argv) < 3 or any(argument.startswith("-") for argument in sys.argv[1:3]):
        raise SystemExit(__doc__)
    export, directory, *options = sys.argv[1:]
    folder = Path(directory)
    if folder.exists():
        raise SystemExit(f"{folder} exists: choose a new directory")
    export = str(Path(export).resolve()) if Path(export).exists() else export
    config = draccus.parse(SpatialVLAConfig, args=[f"--export={export}", *options])
    try:
        config.validate_features()
        load_processor(config)
    except (OSError, ValueError) as error:
        raise SystemExit(f"no policy can be made of {export}: {error}") from None
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for pipeline in make_spatialvla_pre_post_processors(config):
        pipeline.save_pretrained(folder)
    print(f"wrote {folder}: lerobot-eval --policy.path={folder} …")


if __name__ == "__main__":
    main()
