"""The commands `config keys`, `config show` and `config diff`."""

import argparse
import json

from ml_collections import ConfigDict

from spatialvla_jax.cli.arguments import Commands, add_command, add_group
from spatialvla_jax.errors import InputError


def add(commands: Commands) -> None:
    examples = ("keys optimizer", "show --config demo", "diff finetune lora")
    group = add_group(commands, "config", "look up config keys: keys, show, diff", examples)
    p = add_command(group, "keys", run_keys, "list config keys with types, ranges and defaults", ["", "train mesh"])
    p.add_argument("keys", nargs="*", metavar="KEY", help="a key, or a group such as train; by default all")
    p = add_command(
        group,
        "show",
        run_show,
        "print the values that a config resolves to, with types, ranges, defaults and meanings",
        ["", "optimizer train.steps", "mesh --config pretrain --config.mesh.fsdp=64"],
    )
    p.add_argument("keys", nargs="*", metavar="KEY", help="a key, or a group such as train; by default all")
    p.add_argument("--config", help="a config or a run; by default the published recipe")
    p = add_command(
        group,
        "diff",
        run_diff,
        "print the keys whose values differ between two configs or runs",
        ["pretrain finetune", "my_robot.py runs/tuned"],
    )
    for name in ("a", "b"):
        p.add_argument(name, metavar=name.upper(), help="name or path of a config file, or a run's directory")


def run_keys(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import KEYS

    for key in _asked(args.keys):
        print(f"{key}\n    {KEYS[key].meaning}\n    {KEYS[key].describe()}")


def run_show(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import KEYS, default_config, flatten

    if args.overrides and not args.config:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    values = flatten((_config(args.config, args.overrides) if args.config else default_config()).to_dict())
    for key in _asked(args.keys):
        print(f"{key} = {values[key]!r}\n    {KEYS[key].meaning}\n    {KEYS[key].describe()}")


def run_diff(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import flatten

    # A run's config.json has lists where a file has tuples.
    a, b = (flatten(json.loads(json.dumps(_config(source, {}).to_dict()))) for source in (args.a, args.b))
    differing = [key for key in a | b if a.get(key) != b.get(key)]  # old runs may have keys that no longer exist
    for key in differing:
        print(f"{key}: {a.get(key)!r} → {b.get(key)!r}")
    print(f"{len(differing)} of {len(a | b)} keys differ")


def _asked(keys: list[str]) -> list[str]:
    """The requested keys, given by name or group; by default all. Raises InputError."""
    from spatialvla_jax.config import KEYS
    from spatialvla_jax.utils.schema import nearest_name

    found: list[str] = []
    for asked in keys or [""]:
        if not (named := [key for key in KEYS if asked in ("", key) or key.startswith(f"{asked}.")]):
            raise InputError(f"config key {asked} does not exist; {nearest_name(asked, KEYS)}")
        found += named
    return found


def _config(source: str, overrides: dict[str, str]) -> ConfigDict:
    """The config in a file or, if `source` is a directory, of a run. Raises InputError."""
    from spatialvla_jax.config import load_config, train_config_of
    from spatialvla_jax.utils.shipped import shipped
    from spatialvla_jax.utils.storage import as_path, is_dir

    run = as_path(source, "the config")
    if not is_dir(run) or shipped(f"configs/{source}.py").is_file():
        return load_config(source, overrides)
    if overrides:
        raise InputError(f"--config.KEY=VALUE changes a config file, and {source} is a run")
    return train_config_of(run)
