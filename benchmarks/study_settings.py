"""What the study runs: its data, its length, and the settings that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness import ROOT

TRAINED = ["adapters", "rest"]
# The thresholds of the paper's experiments, in per cent.
EXPERIMENTS = {"exp1": (1.0, 5.0), "exp2": (0.5, 2.5), "exp3": (0.25, 1.0)}


@dataclass(frozen=True)
class Setting:
    """A variant.

    about: how it differs from the others, for the table.
    phases: its method; None for one that needs the results of Exp1 (`study.phases_of`).
    exp1: whether it takes something from the results of Exp1, its rank or its duration.
    forks: whether it begins like full training.
    core: whether it is part of the core, which comes first.
    """

    about: str
    phases: list[dict[str, Any]] | None
    exp1: bool = False
    forks: bool = True
    core: bool = True


@dataclass(frozen=True)
class Study:
    """The data and the length of the runs, and what depends on them.

    data: the folder of the shards, of which `train` and `val` are used, and ``test`` once per finished run.
    steps, batch: the length of full training, and its batch size.
    window: the steps of a window of 3 observations.
    checkpoint_every: in steps, a whole number of windows.
    r_max: the largest rank of PreLoRA. relora_rank: the rank of ReLoRA. Both are the paper's share of the width.
    adapters: the linears that can have one.
    experiments: name -> tau and zeta, in per cent.
    """

    recipe: str
    data: str
    test: str
    out: Path
    results: Path
    steps: int
    batch: int
    window: int
    checkpoint_every: int
    r_max: int
    relora_rank: int
    adapters: int
    experiments: Mapping[str, tuple[float, float]]

    @property
    def before_parting(self) -> int:
        """A fork begins this many steps before it can leave full training.

        Full training closes no windows. Algorithm 1 needs three of them, and Algorithm 2 two.
        """
        return 3 * self.window

    def share(self, of_300_epochs: float) -> str:
        """Return the duration that is the same share of a run as ``of_300_epochs`` is of the paper's 300 epochs."""
        return f"{max(1, round(of_300_epochs / 300 * self.steps))} steps"

    @property
    def algorithm_2(self) -> dict[str, Any]:
        return {"ranks": {"rule": "prelora", "r_min": 1, "r_max": self.r_max}}

    def until(self, experiment: str) -> dict[str, Any]:
        tau, zeta = self.experiments[experiment]
        return {"test": "prelora", "tau": tau, "zeta": zeta, "k": 3, "m": 3}

    def prelora(self, experiment: str, *, warmup: float = 10, adapters: Mapping[str, Any] | None = None,
                lora: Mapping[str, Any] | None = None, rate: float = 1) -> list[dict[str, Any]]:
        """Full training, the warm-up, and the LoRA phase with ``lora`` added; adapters have ``rate`` times the rate."""
        new = dict(self.algorithm_2 if adapters is None else adapters)
        scale = {} if rate == 1 else {"lr_scale": {"adapters": rate}}
        full = {"name": "full", "until": self.until(experiment)}
        last = {"name": "lora", "train": TRAINED, **scale, **(lora or {})}
        if warmup == 0:
            return [full, {**last, "adapters": new}]
        return [full, {"name": "warmup", "adapters": new, "until": self.share(warmup), **scale}, last]

    @cached_property
    def settings(self) -> dict[str, Setting]:
        prelora, share, algorithm_2 = self.prelora, self.share, self.algorithm_2
        merge = {"every": share(4.8), "reset": {"rule": "magnitude", "share": 0.25}, "rewarm": share(0.64)}
        relora = {"name": "relora", "adapters": {"rank": self.relora_rank}, "train": TRAINED, "rewarm": share(1),
                  "merge": merge}
        some = {"k": self.adapters * 2 // 3, "every": "4 steps"}
        few = f"{some['k']} of {self.adapters} adapters"
        freezing = {"choose": "unconverged", "tau": 0.1, "every": share(3), "cut_backward": True}
        rates = {rate: Setting(f"exp1 with {rate} times the learning rate for adapters", prelora("exp1", rate=rate))
                 for rate in (4, 10, 30)}
        core = {
            "full": Setting("all parameters train to the end", [{"name": "full"}], forks=False),
            **{name: Setting(f"PreLoRA: tau {tau:g} %, zeta {zeta:g} %, w = 10 epochs, ranks by Algorithm 2",
                             prelora(name)) for name, (tau, zeta) in self.experiments.items()},
            "equal_compute": Setting("full training of as many steps as cost the FLOPs of exp1", [{"name": "full"}],
                                     exp1=True, forks=False),
            "static_lora": Setting("LoRA from the first step on, with the mean rank of exp1", None, exp1=True,
                                   forks=False),
            "uniform": Setting("exp1 with its mean rank in each linear", None, exp1=True),
            "no_warmup": Setting("exp1 with w = 0", prelora("exp1", warmup=0)),
            "moments_dropped": Setting("exp1 with new Adam moments after each switch", dropped(prelora("exp1"))),
            "relora": Setting(f"full training for 48 epochs, then ReLoRA of rank {self.relora_rank} with a merge every "
                              "4.8 epochs", [{"name": "full", "until": share(48)}, relora]),
            "hybrid": Setting("relora until the test of exp1 passes, then its warm-up and LoRA phase", [
                {"name": "full", "until": share(48)}, {**relora, "until": self.until("exp1")},
                {"name": "warmup", "adapters": {"from": "merge", **algorithm_2}, "until": share(10)},
                {"name": "lora", "train": TRAINED}]),
            "dynalora_random": Setting(f"exp1 with {few} active, drawn anew every 4 steps",
                                       prelora("exp1", lora={"active": {"choose": "random", **some}})),
            "dynalora_forward": Setting(f"exp1 with {few} active, chosen by forward importance",
                                        prelora("exp1", lora={"active": {
                                            "choose": "discounted", "importance": "forward", **some}})),
            "freezing": Setting("exp1 with adapters frozen once they have settled, and no backward pass below the "
                                "others", prelora("exp1", lora={"active": freezing})),
        }
        later = {
            "equal_time": Setting("full training of as many steps as take the time of exp1 at ViT-L's rates",
                                  [{"name": "full"}], exp1=True, forks=False),
            "w5": Setting("exp1 with w = 5", prelora("exp1", warmup=5)),
            "w15": Setting("exp1 with w = 15", prelora("exp1", warmup=15)),
            "random_ranks": Setting("exp1 with the ranks of Algorithm 2 in a random order", prelora(
                "exp1", adapters={"ranks": {**algorithm_2["ranks"], "rule": "random", "draw": "permuted"}})),
            "fixed_25": Setting("exp1 with a switch at 25 % of the run", [
                {"name": "full", "until": {"test": "fixed", "at": 0.25, "m": 3}}, *prelora("exp1")[1:]]),
            "fixed_50": Setting("exp1 with a switch at 50 % of the run", [
                {"name": "full", "until": {"test": "fixed", "at": 0.5, "m": 3}}, *prelora("exp1")[1:]]),
            "update_no_warmup": Setting(
                "exp1 with w = 0, and A from the singular directions of the recent update",
                prelora("exp1", warmup=0, adapters={**algorithm_2, "options": {"init": "update"}})),
            **{f"rate_{rate}": setting for rate, setting in rates.items()},
            "rate_10_exp3": Setting("exp3 with 10 times the learning rate for adapters", prelora("exp3", rate=10)),
            "rate_10_merging": Setting("rate_10 that merges its adapters every 4.8 epochs, as relora does",
                                       prelora("exp1", lora={"merge": merge}, rate=10)),
            "rate_10_freezing": Setting("freezing with 10 times the learning rate for adapters",
                                        prelora("exp1", rate=10, lora={"active": freezing})),
            "dora": Setting("exp1 with DoRA", prelora("exp1", adapters={"kind": "dora", **algorithm_2})),
            "dynavera": Setting(
                f"exp1 with w = 0 and VeRA of rank {self.relora_rank}, {few} active by forward importance",
                prelora("exp1", warmup=0, adapters={"kind": "vera", "rank": self.relora_rank}, lora={
                    "lr_scale": {"adapters": 10},
                    "active": {"choose": "discounted", "importance": "forward", **some}})),
            "dynalora_backward": Setting(
                "dynalora_forward by backward importance",
                prelora("exp1", lora={"active": {"choose": "discounted", "importance": "backward", **some}})),
        }
        return core | {name: replace(setting, core=False) for name, setting in later.items()}


def dropped(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same phases, each of which begins with new Adam moments, as a new job would."""
    return [phases[0], *({**phase, "moments": "reset"} for phase in phases[1:])]


FASHION = Study(
    recipe="launch/recipes/fashion_full.yaml", data="data/fashion", test="test", out=ROOT / "out/study",
    results=ROOT / "benchmarks/results/study",
    steps=2149,  # 20 epochs of 55,000 images in batches of 512
    batch=512, window=21, checkpoint_every=105, r_max=8, relora_rank=24, adapters=36, experiments=EXPERIMENTS,
)


def digits(folder: Path) -> Study:
    """Return the same study in short runs on scikit-learn's digits, with everything it writes in ``folder``."""
    return Study(
        recipe="launch/recipes/digits_full.yaml", data=str(folder / "digits"), test="val", out=folder,
        results=folder / "results", steps=240, batch=96, window=9, checkpoint_every=36, r_max=4, relora_rank=16,
        adapters=24,
        # A window is a larger share of so short a run, in which more changes.
        experiments={"exp1": (4.0, 20.0), "exp2": (2.0, 10.0), "exp3": (1.0, 5.0)},
    )
