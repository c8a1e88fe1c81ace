"""The findings of a sweep: means over seeds, differences from a reference, and conclusions drawn by fixed rules.

Trials are averaged over seeds and nothing else. A difference compares two trials with the same seed whose values differ
in one axis only.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spatialvla_jax.reports.trials import BASELINES, L1, PLATEAU, SUCCESS, Quantity, Results, Trial

DRAWS = 10_000  # of a bootstrap, from a generator of seed 0
FEWEST = 3  # pairs: with two, the interval excludes 0 half of the time even if nothing differs
PAIRED = (
    "Differences from the reference, between trials with the same seed and the same other factors: mean over n pairs, "
    f"and its 95 % interval from a bootstrap over pairs ({DRAWS:,} draws, seed 0)."
)
ENOUGH = 6  # pairs: the range of n covers their median with a probability of 1 - 2^(1 - n), and no interval is wider

# {conclusion: (the sentence about one difference, the sentence about several)}; {} are their names.
VERDICTS = {
    "includes 0": (
        "the interval of {} includes 0, so nothing can be concluded about it.",
        "the intervals of {} include 0, so nothing can be concluded about them.",
    ),
    "not comparable": ("other episodes, or errors over another chunk length, so not comparable: {}.",) * 2,
    "too few pairs": (f"fewer than {FEWEST} pairs of trials prove nothing: {{}}.",) * 2,
    "better": ("better, and the interval excludes 0: {}.", "better, and the intervals exclude 0: {}."),
    "worse": ("worse, and the interval excludes 0: {}.", "worse, and the intervals exclude 0: {}."),
}


class Difference(NamedTuple):
    """`value` minus `reference` of an axis. `others` are the values of the other axes; it is empty if only one axis is
    ever varied at a time. `pairs` holds one difference per seed. The interval of their mean is None for a single pair
    of trials without episodes. Errors are `comparable` if they were measured on the same episodes with the same length
    of chunk, success rates if they were measured on the same tasks."""

    axis: str
    value: str
    reference: str
    others: dict[str, str]
    pairs: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    comparable: bool

    @property
    def against(self) -> str:
        return f"{self.value} − {self.reference}"

    @property
    def place(self) -> str:
        return f"{self.against} ({words(self.others)})" if self.others else self.against

    @property
    def label(self) -> str:
        return f"{self.against} ({', '.join(filter(None, (words(self.others), f'n = {len(self.pairs)}')))})"

    def conclusion(self, quantity: Quantity) -> str:
        if not self.comparable:
            return "not comparable"
        if self.interval is None or len(self.pairs) < FEWEST:
            return "too few pairs"
        low, high = self.interval
        if low <= 0 <= high:
            return "includes 0"
        return "better" if (high < 0) == (quantity == L1) else "worse"


class Facet(NamedTuple):
    """Trials that differ only in one axis and the seed: {value of `axis`: trials}. `others` is as in `Difference`."""

    axis: str
    others: dict[str, str]
    groups: dict[str, list[Trial]]


def words(values: dict[str, str]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())


def combinations(results: Results) -> list[tuple[dict[str, str], list[Trial], int]]:
    """(values, finished trials, trials planned) of every combination of axis values that has a trial, as planned."""
    planned = [tuple(trial["values"].items()) for trial in results.plan["trials"].values()]
    rows = []
    for values in map(dict, dict.fromkeys(planned)):
        if trials := [trial for trial in results.trials if trial.values == values]:
            rows.append((values, trials, planned.count(tuple(values.items()))))
    return rows


def summary(quantity: Quantity, trials: Sequence[Trial]) -> dict[str, Any]:
    """{"n", "mean", "standard_error" (None for n = 1)} over seeds; {"n", "reached"} for the plateau, and {"n", "mean",
    "interval", "episodes"} for success. Empty if no trial has the quantity."""
    having = [trial for trial in trials if quantity.key in trial.numbers]
    if not having:
        return {}
    values = np.array([trial.numbers[quantity.key] for trial in having])
    if quantity == PLATEAU:
        return {"n": len(values), "reached": int(values.sum())}
    found = {"n": len(values), "mean": float(values.mean())}
    if quantity == SUCCESS:
        interval = bootstrap(np.stack([success_draws(trial) for trial in having]))
        return found | {"interval": interval, "episodes": sum(trial.episodes for trial in having)}
    return found | {"standard_error": float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None}


def bootstrap(values: Float[np.ndarray, " n"] | Float[np.ndarray, "n draws"]) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, from a bootstrap over n `values`: [n], or [n, draws] if each value is
    uncertain itself and given as draws."""
    chosen = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    drawn = values[chosen] if values.ndim == 1 else values[chosen, np.arange(DRAWS)[:, None]]
    low, high = np.quantile(drawn.mean(1), (0.025, 0.975))
    return float(low), float(high)


def success_draws(trial: Trial) -> Float[np.ndarray, " draws"]:
    """Draws of a trial's success rate in percent, given k solved of n episodes: Beta(k + 1/2, n - k + 1/2), which is
    also uncertain if none or all were solved."""
    solved = trial.numbers[SUCCESS.key] / 100 * trial.episodes
    rng = np.random.default_rng(zlib.crc32(trial.name.encode()))
    return 100 * rng.beta(solved + 0.5, trial.episodes - solved + 0.5, DRAWS)


def facets(results: Results) -> list[Facet]:
    """Every axis, with each combination of the others' values that has trials for two or more of its values."""
    found = []
    for axis, values in results.plan["axes"].items():
        apart: dict[tuple[tuple[str, str], ...], dict[str, list[Trial]]] = {}
        for trial in results.trials:
            others = tuple(item for item in trial.values.items() if item[0] != axis)
            apart.setdefault(others, {}).setdefault(trial.values[axis], []).append(trial)
        for others, groups in apart.items():
            if len(groups) > 1:
                named = {} if results.one_axis else dict(others)
                found.append(Facet(axis, named, {value: groups[value] for value in values if value in groups}))
    return found


def cover(results: Results) -> list[Facet]:
    """The fewest facets that show every trial, longest axes first; then the trials that are in no facet."""
    chosen, shown = list[Facet](), set[str]()
    lengths = {axis: len(values) for axis, values in results.plan["axes"].items()}
    for facet in sorted(facets(results), key=lambda facet: -lengths[facet.axis]):
        names = {trial.name for trials in facet.groups.values() for trial in trials}
        if not names <= shown:
            chosen.append(facet)
            shown |= names
    rest: dict[str, list[Trial]] = {}
    for trial in results.trials:
        if trial.name not in shown:
            rest.setdefault(", ".join(trial.values.values()) or "all", []).append(trial)
    return [*chosen, Facet(", ".join(lengths), {}, rest)] if rest else chosen


def differences(results: Results, quantity: Quantity) -> list[Difference]:
    """The difference of every value of every axis from the reference, over the seeds that both have."""
    found = []
    for axis, others, groups in facets(results):
        reference = results.plan["reference"][axis]
        base = {trial.seed: trial for trial in groups.get(reference, []) if quantity.key in trial.numbers}
        for value, trials in groups.items():
            pairs = [(t, base[t.seed]) for t in trials if quantity.key in t.numbers and t.seed in base]
            if value == reference or not pairs:
                continue
            values = np.array([one.numbers[quantity.key] - other.numbers[quantity.key] for one, other in pairs])
            interval = None
            if quantity == SUCCESS:
                interval = bootstrap(np.stack([success_draws(one) - success_draws(other) for one, other in pairs]))
            elif len(pairs) > 1:
                interval = bootstrap(values)
            if quantity == SUCCESS:
                same = all(one.tasks == other.tasks for one, other in pairs)
            else:
                same = all(one.baseline_key == other.baseline_key for one, other in pairs)
            pairs = tuple(map(float, values))
            found.append(Difference(axis, value, reference, others, pairs, float(values.mean()), interval, same))
    return found


def baselines(results: Results) -> list[tuple[str, dict[str, float]]]:
    """(name, numbers) of each baseline. A baseline depends only on the evaluated episodes and the chunk length. Trials
    that differ in these have separate baselines, and the name says whose they are."""
    apart: dict[tuple[float, ...], list[Trial]] = {}
    for trial in results.trials:
        apart.setdefault(trial.baseline_key, []).append(trial)
    found = []
    for name in BASELINES:
        for key, trials in apart.items():
            common = set.intersection(*(set(trial.values.items()) for trial in trials))
            others = {item for trial in results.trials if trial.baseline_key != key for item in trial.values.items()}
            where = {axis: value for axis, value in trials[0].values.items() if (axis, value) in common - others}
            # If no axis tells these trials apart, name the first of them.
            whose = words(where) or f"{trials[0].name}{', …' * (len(trials) > 1)}"
            found.append((f"{name} ({whose})" if len(apart) > 1 else name, trials[0].baselines[name]))
    return found


def conclusions(results: Results) -> list[str]:
    """The conclusions, in sentences, including comparisons that allow none."""
    trials = results.trials
    best = min(trials, key=lambda trial: trial.numbers[L1.key])
    said = []
    for name in reversed(BASELINES):
        better = [trial for trial in trials if trial.numbers[L1.key] < trial.baselines[name][L1.key]]
        holding = "holding the last action" if name == "last action held" else "the mean action"
        if better:
            said.append(f"{len(better)} of {len(trials)} trials are better than {holding} by {L1.name}.")
        else:
            said.append(
                f"No trial is better than {holding}: the lowest {L1.name} is {best.numbers[L1.key]:.3f} "
                f"({best.label}), {holding} has {best.baselines[name][L1.key]:.3f}. Nothing can be concluded about "
                "good policies."
            )
    known = [trial for trial in trials if trial.plateau is not None]
    reached = sum(bool(trial.plateau) for trial in known)
    if reached < len(trials):
        unknown = f"; {len(trials) - len(known)} have too few validations to tell" if len(known) < len(trials) else ""
        said.append(
            f"{reached} of {len(trials)} trials have reached their plateau{unknown}. Longer training may change the "
            "order of the others."
        )
    if len({trial.baseline_key for trial in trials}) > 1:
        said.append(
            "The baselines of trials differ, as their episodes or lengths of chunk do: compare a trial's "
            f"{L1.name} with its own baselines."
        )
    for quantity in (L1, SUCCESS):
        said += _said_of_differences(differences(results, quantity), quantity)
    commits = {trial.result.get("provenance", {}).get("commit") for trial in trials} - {None, ""}
    if len(commits) > 1:
        said.append(f"The trials were made by {len(commits)} different commits of the code.")
    for what, names in {"failed": list(results.failed), "not finished": results.missing}.items():
        if names:
            said.append(f"{len(names)} of {len(results.plan['trials'])} trials {what}: {', '.join(names)}.")
    return said


def _said_of_differences(found: list[Difference], quantity: Quantity) -> list[str]:
    said = []
    for axis in dict.fromkeys(difference.axis for difference in found):
        for outcome, verdict in VERDICTS.items():
            mine = [difference for difference in found if difference.axis == axis]
            mine = [difference for difference in mine if difference.conclusion(quantity) == outcome]
            if mine:
                whose = "; ".join(difference.label for difference in mine)
                said.append(f"{axis}, {quantity.name}: {verdict[len(mine) > 1].format(whose)}")
    counts = [len(difference.pairs) for difference in found if difference.interval]
    if counts and quantity == L1 and (fewest := min(counts)) < ENOUGH:
        said.append(
            f"The intervals of {L1.name} rest on as few as n = {fewest} pairs. An interval is never wider than the "
            f"range of its pairs, and that of {fewest} covers the true median in only "
            f"{100 * (1 - 2 ** (1 - fewest)):.0f} % of cases, not in 95 %."
        )
    return said
