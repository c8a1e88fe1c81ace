"""`train --rehearse`: a few steps in a scratch folder beside the workdir, then go or no-go."""

import contextlib
from pathlib import Path

from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from spatialvla_jax.errors import InputError
from spatialvla_jax.planning.rehearsal import judge, rehearse
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.storage import AnyPath, is_file, occupied
from spatialvla_jax.utils.tables import text_table

MARK = "rehearsal"  # a file that identifies a scratch folder, even if its process was killed
VERDICTS = {True: "go", False: "NO-GO", None: "unknown"}


def run(config: ConfigDict, workdir: AnyPath, steps: int, age: float) -> None:
    """Rehearse in a scratch folder, which is removed, and print the findings. Exits with 1 for a no-go."""
    folder = workdir.with_name(f"{workdir.name}-rehearsal")
    if steps < 2 or config.train.steps < 2:
        raise InputError("a rehearsal needs 2 steps or more: the first one compiles")
    if occupied(folder) and not is_file(folder / MARK):
        raise InputError(
            f"{folder} is needed for the rehearsal but was not made by one: remove it, or use another --workdir"
        )
    multihost_utils.sync_global_devices("the rehearsal's folder was looked at")
    made = [parent for parent in folder.parents if not parent.exists()] if isinstance(folder, Path) else []
    try:
        if is_writer():
            epath.Path(folder).rmtree(missing_ok=True)
            folder.mkdir(parents=True)
            (folder / MARK).write_text("")
        multihost_utils.sync_global_devices("the rehearsal's folder was made")
        report = rehearse(config, folder, steps, age)
        multihost_utils.sync_global_devices("the rehearsal is over")
    finally:
        if is_writer():
            epath.Path(folder).rmtree(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is there now
                for parent in made:
                    parent.rmdir()
    rows = judge(report)
    against = [what for what, _, go in rows if go is False]
    if is_writer():
        count, whole = report["devices"], report["all_steps"] * report["step_seconds"]
        print(f"{report['steps']} steps on {count} {report['device_kind']} device{'s' * (count > 1)}")
        print(text_table([[what, VERDICTS[go], found] for what, found, go in rows]))
        print(
            f"all {report['all_steps']:,} steps: {whole / 86400:.2f} days, {whole * count / 3600:,.1f} device-hours, "
            f"after a start of {report['start_seconds']:.0f} s"
        )
        print(f"no-go: {', '.join(against)}" if against else "go")
    if against:
        raise SystemExit(1)
