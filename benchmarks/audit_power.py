"""What each audit sees of broken DP-SGD: breaks by audits, how often each refutes.

    python benchmarks/audit_power.py --repetitions 20

Each repetition breaks private training where it is done (`tests/studies/audit/breaks.py`) and then
asks every audit about it: what looks at a run's start, canaries in a teacher trained once more
(from its answers, and from its noisy steps), and the mechanism. The run is that of
`configs/audit/overfitted.yaml` with a promise of epsilon 2. Canaries take longest: they may have
fewer repetitions. A line is printed after each, the table of docs/audit.md at the end.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

from fedkd.config import load_experiment
from fedkd.models.network import Network
from fedkd.privacy.model_check import check_private
from fedkd.privacy.noise_check import check_noise
from fedkd.rounds import ExperimentContext
from fedkd.simulations.local import run_local
from fedkd.studies.audit.finding import overall
from fedkd.studies.audit.noisy_steps import of_dp_sgd
from fedkd.studies.audit.promise import promised
from fedkd.studies.audit.study import epsilon_of_training, unseen
from tests.studies.audit.breaks import BREAKS, broken

OVERRIDES = (
    "teachers.privacy={epsilon: 2.0, delta: 1.0e-5, nominal_size: 160}",
    "evaluation.teachers=false",
)


def begins(space: ExperimentContext, network: Network) -> bool:
    """Whether a run begins: its teachers' model is tried, and their noise."""
    assert space.plan is not None
    try:
        check_private(network, space.data.test.shape, len(space.data.classes))
        check_noise(space.plan.mechanism)
    except (RuntimeError, ValueError):
        return False
    return True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--canary-repetitions", type=int, default=3)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--trainings", type=int, default=50)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    experiment = load_experiment("configs/audit/overfitted.yaml", [*OVERRIDES, f"output={folder}"])
    run = run_local(experiment)
    space = ExperimentContext(experiment)
    promise = promised(run, space, 0)
    assert promise.claim is not None
    assert promise.training.mechanism is not None
    mechanism, claim, pool = promise.training.mechanism, promise.claim, unseen(space)
    network = space.network(experiment.teachers.model_of(0), "power")

    def canaries(draw: int) -> tuple[bool, bool, str]:
        bounds = epsilon_of_training(
            space, 0, pool, given.canaries, claim.delta, promise.training, draw
        )
        black, white = (0.0 if bound is None else bound.epsilon for bound in bounds)
        return black > claim.epsilon, white > claim.epsilon, f"{black:.2f}, {white:.2f}"

    def tested() -> bool:
        _, findings = of_dp_sgd(
            mechanism,
            promise.training.rounds,
            together=True,
            delta=claim.delta,
            trainings=given.trainings,
        )
        return overall(findings) == "refuted"

    rows = []
    for name in BREAKS:
        counts, bounds = [0, 0, 0, 0], []
        few = min(given.canary_repetitions, given.repetitions)
        for number in range(given.repetitions):
            with broken(name):
                counts[0] += not begins(space, network)
                counts[3] += tested()
                if number < few:
                    black, white, text = canaries(number + 1)
                    counts[1] += black
                    counts[2] += white
                    bounds.append(text)
            print(name, number + 1, counts, bounds[-1:] if number < few else "", flush=True)
        cells = [f"{counts[place]} of {few if place in (1, 2) else given.repetitions}"
                 for place in range(4)]  # fmt: skip
        rows.append(f"| {name} | {' | '.join(cells)} |")
        print(name, "bounds (answers, steps):", *bounds, sep="\n  ", flush=True)
    print("| break | start-up | canaries, answers | canaries, every step | mechanism |")
    print("|---|---|---|---|---|")
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
