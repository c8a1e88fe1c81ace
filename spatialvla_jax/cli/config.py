"""The command `config show`: what the config keys mean and what they may be."""

import argparse

from spatialvla_jax.cli.arguments import Commands, add_command, add_group
from spatialvla_jax.errors import InputError


def add(commands: Commands) -> None:
    group = add_group(commands, "config", "look up config keys", ("show optimizer", "show --config demo"))
    p = add_command(
        group,
        "show",
        run_show,
        "print config keys with their values, types, ranges and meanings",
        ["", "optimizer train.steps", "mesh --config pretrain --config.mesh.fsdp=64"],
    )
    p.add_argument("keys", nargs="*", metavar="KEY", help="a key, or a group such as train; by default all")
    p.add_argument("--config", help="print the values of this config; by default the published recipe's")


def run_show(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import KEYS, default_config, flatten, load_config
    from spatialvla_jax.utils.schema import nearest_name

    if args.overrides and not args.config:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    config = load_config(args.config, args.overrides) if args.config else default_config()
    values = flatten(config.to_dict())
    for asked in args.keys or [""]:
        if not (found := [key for key in KEYS if asked in ("", key) or key.startswith(f"{asked}.")]):
            raise InputError(f"config key {asked} does not exist; {nearest_name(asked, KEYS)}")
        for key in found:
            print(f"{key} = {values[key]!r}\n    {KEYS[key].meaning}\n    {KEYS[key].describe()}")
