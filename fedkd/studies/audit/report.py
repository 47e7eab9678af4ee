"""What an audit found, as a page: attacks with their intervals, the promise beside the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.reporting import figures, page

PAGE = "audit.html"

ATTACKERS = {
    ("teacher", "loss"): "the teacher's weights; calls images of small loss members",
    ("teacher", "lira offline"): "the teacher's weights, and images like the client's to train "
    "shadow models on, none of them with the image in question",
    ("teacher", "lira"): "the same, and shadow models with and without each image in question",
    ("knowledge", "loss"): "what the server holds of the client, its logits on the transfer set, "
    "and trains a student of this client alone; calls images of small loss members",
    ("knowledge", "calibrated"): "the same, and shadow models that tell how hard an image is",
    ("student", "loss"): "the student; calls images of small loss members",
    ("student", "calibrated"): "the student, and shadow models that tell how hard an image is",
}
"""(target, attack) -> what the attacker has."""

VERDICTS = {
    "refuted": "The bound is above the claim: it does not hold. Look for images that reach the "
    "teacher beside the private training, and at the parameters in the claim.",
    "consistent": "The bound does not contradict the claim. That is no proof of it: an audit "
    "finds what its attack can see.",
    "no power": "Perfect guessing could not have contradicted this claim: take more canaries, "
    "or a smaller delta.",
    "no claim": "Nothing was claimed that canaries could test, so the bound stands alone.",
}


def write(facts: Mapping[str, Any], folder: Path) -> Path:
    """`audit.html` in the run's folder; returns its path."""
    attacks = facts["attacks"]
    with figures.style():
        cards = [
            page.Card(
                "Who took part in the training?",
                "Area under the ROC curve of each attack with its 95 % interval; at 0.5 the "
                "attacker guesses. Orange attacks do better, by this area or by the members they "
                "find while hardly accusing others (TPR below). By chance alone about one in "
                "twenty would.",
                picture=figures.svg(auc_picture(attacks), "auc"),
            )
        ]
        if facts["bound"] is not None:
            cards.append(
                page.Card(
                    "Epsilon: what was claimed and what was seen",
                    " ".join(filter(None, (facts["promise"], VERDICTS[facts["verdict"]]))),
                    picture=figures.svg(epsilon_picture(facts), "epsilon"),
                )
            )
    if facts["bound"] is not None:
        cards.append(_bound(facts))
    cards += [
        page.Card(
            "Attacks",
            "TPR: share of members found while at most 1 % of the others are accused. "
            "As many members as others of every class, so labels alone tell nothing.",
            header=["target", "attack", "client", "images", "AUC", "95 %", "TPR", "95 %"],
            rows=[_row(attack) for attack in attacks],
        ),
        page.Card(
            "What each attacker has",
            "All have the images in question with their labels, and know the configuration. "
            f"Shadow models are trained as client {facts['client']}'s teacher is, on random "
            "halves of its members and others.",
            numbers=False,
            header=["target", "attack", "has"],
            rows=[
                [target, attack, text]
                for (target, attack), text in ATTACKERS.items()
                if any(a["target"] == target and a["attack"] == attack for a in attacks)
            ],
        ),
    ]
    return page.write(
        folder / PAGE,
        title=f"{facts['run']}: audit",
        sentence=sentence(facts),
        cards=cards,
        footer=f"{facts['run']} · these numbers were computed from private images: keep them there",
    )


def sentence(facts: Mapping[str, Any]) -> str:
    """What came out, in one or two sentences."""
    leaks = [attack for attack in facts["attacks"] if attack["leaks"]]
    if leaks:
        worst = max(leaks, key=lambda attack: attack["auc"])
        text = (
            f"{len(leaks)} of {len(facts['attacks'])} attacks "
            f"{'tells' if len(leaks) == 1 else 'tell'} members better than chance; "
            f"the best is {worst['attack']} on {_whose(worst)} with an AUC of {worst['auc']:.2f}."
        )
    else:
        text = f"None of {len(facts['attacks'])} attacks tells members better than chance."
    bound, claim = facts["bound"], facts["claim"]
    if bound is not None:
        seen = f"at least {bound['epsilon']:.2f}" if bound["epsilon"] > 0 else "more than 0"
        shows = "Canaries show" if bound["epsilon"] > 0 else "Canaries do not show"
        text += f" {shows} that epsilon is {seen}"
        if claim is not None:
            text += f"; claimed is at most {claim['epsilon']:.3g}: {facts['verdict']}"
        text += "."
    if facts["promise"] and (claim is None or bound is None):
        text += f" {facts['promise']}"
    return text


def auc_picture(attacks: Sequence[Mapping[str, Any]]) -> Any:
    """A dot and an interval for every attack."""
    figure, axes = figures.canvas(7.2, 0.9 + 0.26 * len(attacks))
    place = np.arange(len(attacks))[::-1]
    values = np.array([attack["auc"] for attack in attacks])
    ends = np.array([attack["auc_interval"] for attack in attacks])
    for at, attack, value, (low, high) in zip(place, attacks, values, ends, strict=True):
        color = "#D55E00" if attack["leaks"] else "#0072B2"
        axes.plot([low, high], [at, at], color=color, lw=2, solid_capstyle="round")
        axes.plot([value], [at], "o", color=color, ms=5)
    axes.axvline(0.5, color=figures.INK, lw=0.8, ls=":")
    axes.set_yticks(place, [f"{_whose(attack)}, {attack['attack']}" for attack in attacks])
    axes.set_xlim(min(0.4, float(ends.min()) - 0.02), 1.01)
    axes.set_ylim(-0.7, len(attacks) - 0.3)
    axes.set_xlabel("AUC")
    return figure


def epsilon_picture(facts: Mapping[str, Any]) -> Any:
    """What was shown, promised, and could have been seen, on one line."""
    bound, claim = facts["bound"], facts["claim"]
    figure, axes = figures.canvas(7.2, 1.5)
    shown, largest = bound["epsilon"], bound["largest"]
    axes.barh([0], [largest], height=0.5, color="#8a929a", alpha=0.25)
    axes.barh([0], [shown], height=0.5, color="#D55E00")
    label = f"shown: at least {shown:.2f}" if shown > 0 else "shown: nothing"
    axes.annotate(label, (shown, 0.33), ha="left", va="bottom", fontsize=8, color="#D55E00")
    axes.annotate(
        f"visible up to {largest:.2f}",
        (largest, -0.33),
        ha="right",
        va="top",
        fontsize=8,
        color=figures.INK,
    )
    if claim is not None:
        axes.axvline(claim["epsilon"], color="#0072B2", lw=2)
        axes.annotate(
            f"claimed: at most {claim['epsilon']:.3g}", (claim["epsilon"], 0.75), xytext=(4, 0),
            textcoords="offset points", ha="left", va="top", fontsize=8, color="#0072B2",
        )  # fmt: skip
    axes.set_xlim(0, 1.35 * max(largest, 0 if claim is None else claim["epsilon"]))
    axes.set_ylim(-0.8, 0.8)
    axes.set_yticks([])
    axes.set_xlabel("epsilon")
    return figure


def _bound(facts: Mapping[str, Any]) -> page.Card:
    bound, claim = facts["bound"], facts["claim"]
    rows = [
        ["claimed epsilon", "none" if claim is None else f"{claim['epsilon']:.3g}"],
        [f"lower bound at {100 * bound['confidence']:g} % confidence", f"{bound['epsilon']:.2f}"],
        ["largest bound that this audit could give", f"{bound['largest']:.2f}"],
        ["delta", f"{bound['delta']:g}"],
        ["canaries", f"{bound['canaries']}"],
        ["right guesses", f"{bound['right']} of {bound['guesses']}"],
    ]
    return page.Card(
        "Epsilon from one training",
        f"Client {facts['client']}'s teacher ({facts['model']}) was trained once more "
        f"{_how(facts['training'])}; each canary, an image under a wrong "
        "label, was among its images by the toss of a coin (Steinke, Nasr and Jagielski 2023).",
        header=["", ""],
        rows=rows,
    )


def _how(training: Mapping[str, Any]) -> str:
    rounds = training["rounds"]
    times = "one round" if rounds == 1 else f"{rounds} rounds"
    mechanism = training["mechanism"]
    if mechanism is not None:
        return (
            f"for {times} with DP-SGD ({mechanism['steps']} steps a round, sampling rate "
            f"{mechanism['sample_rate']:.3g}, noise {mechanism['noise_multiplier']:.3g})"
        )
    if training["label_epsilon"] is not None:
        return f"for {times} with randomised labels"
    return f"for {times} without DP-SGD"


def _row(attack: Mapping[str, Any]) -> list[str]:
    who = "all" if attack["client"] is None else str(attack["client"])
    return [
        attack["target"], attack["attack"], who, f"{attack['members']} + {attack['others']}",
        f"{attack['auc']:.3f}", _interval(attack["auc_interval"]),
        f"{100 * attack['tpr']:.1f} %", _interval(attack["tpr_interval"], 100),
    ]  # fmt: skip


def _interval(ends: Sequence[float], factor: float = 1) -> str:
    digits = 1 if factor == 100 else 2
    return " to ".join(f"{factor * end:.{digits}f}" for end in ends)


def _whose(attack: Mapping[str, Any]) -> str:
    if attack["client"] is None:
        return f"{attack['target']} (all clients)"
    return f"{attack['target']} (client {attack['client']})"
