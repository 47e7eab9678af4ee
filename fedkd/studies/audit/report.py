"""What an audit found, as a page: attacks with their intervals, the promise beside the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedkd.reporting import page
from fedkd.reporting.drawing import INK, PSEUDO, STUDENT, TEACHER, Dot, canvas, dots, note, style
from fedkd.reporting.format import count, interval, percent
from fedkd.reporting.page import Card, Page, Section
from fedkd.reporting.table import Cell, Column, Row, Table, numbers, plain, words

PAGE = "audit.html"

ATTACKERS = {
    ("teacher", "loss"): "the teacher's weights; calls images of small loss members",
    ("teacher", "lira offline"): "the teacher's weights, and images like the client's to train "
    "shadow models on, none of them with the image in question",
    ("teacher", "lira"): "the same, and shadow models with and without each image in question",
    ("knowledge", "loss"): "what the server holds of the client, its logits on the transfer set, "
    "and trains a student of this client alone; calls images of small loss members",
    ("knowledge", "calibrated"): "the same, and shadow models that show how hard an image is",
    ("student", "loss"): "the student; calls images of small loss members",
    ("student", "calibrated"): "the student, and shadow models that show how hard an image is",
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
    attacks = _attacks(facts) if "attacks" in facts else []
    mechanism = _mechanism(facts["mechanism"]) if "mechanism" in facts else []
    return page.write(
        folder / PAGE,
        Page(
            title=f"{facts['run']}: audit",
            sentence=sentence(facts),
            sections=[
                Section("results", "Attacks on the run", attacks),
                Section("mechanism", "The mechanism", mechanism),
                Section("again", "Again", [page.again(facts.get("command", ""))]),
            ],
            footer=f"{facts['run']} · these numbers were computed from private images: keep them "
            "there",
        ),
    )


def _attacks(facts: Mapping[str, Any]) -> list[Card]:
    return [
        Card(
            "Who took part in the training?",
            "Area under the ROC curve of each attack with its 95 % interval; at 0.5 the "
            "attacker guesses. Orange attacks do better, by this area or by the members they "
            "find while hardly accusing others (TPR below). By chance alone about one in "
            "twenty would.",
            [auc_figure(facts["attacks"])],
        ),
        *(_bound(facts) if facts["bound"] is not None else ()),
        Card(
            "Attacks",
            "TPR: share of members found while at most 1 % of the others are accused. "
            "As many members as others of every class, so labels alone give nothing away.",
            table=attacks_table(facts),
        ),
        Card(
            "What each attacker has",
            "All have the images in question with their labels, and know the configuration. "
            f"Shadow models are trained as client {facts['client']}'s teacher is, on random "
            "halves of its members and others.",
            table=plain(
                words("target", "attack", "has"),
                [
                    (target, attack, text)
                    for (target, attack), text in ATTACKERS.items()
                    if any((a["target"], a["attack"]) == (target, attack) for a in facts["attacks"])
                ],
            ),
        ),
    ]


def _mechanism(facts: Mapping[str, Any]) -> list[Card]:
    of_labels = facts["training"]["mechanism"] is None
    how = (
        "Labels are randomised as a client's are, many of them."
        if of_labels
        else "Tiny networks are trained by the function that trains the run's teachers, with its "
        f"sampling rate, noise and clipping norm: {facts['trainings']:,} on black images, which "
        "have no gradient, and as many on the same and a white one, whose gradient is a thousand "
        "clipping norms long. Where clients of a simulation are trained together, that is tested "
        "as well."
    )
    return [
        Card(
            "Does the code do what the promise rests on?",
            f"{how} All tests together accuse a right mechanism once in "
            f"{1 / facts['false_alarm']:,.0f} audits. No private image is read.",
            table=mechanism_table(facts),
        ),
        Card(
            "In words",
            table=plain(words(""), [(finding["text"],) for finding in facts["findings"]]),
        ),
    ]


def mechanism_table(facts: Mapping[str, Any]) -> Table:
    """One row for each test."""
    columns = [
        *words("trained", "test"),
        Column("over", on="page"),
        *numbers("promised", "seen"),
        *words("verdict"),
    ]
    rows = [
        Row(
            [
                *(finding[key] for key in ("path", "test", "over", "expected", "seen")),
                Cell(finding["verdict"], strong=finding["verdict"] == "refuted"),
            ]
        )
        for finding in facts["findings"]
    ]
    return Table(columns, rows, "mechanism: what the code does, beside what the promise rests on")


def attacks_table(facts: Mapping[str, Any]) -> Table:
    """One row for each attack."""
    columns = [
        *words("target, client", "attack"),
        Column("images", number=True, on="page"),
        *numbers("AUC", "95 %", "TPR", "95 %"),
    ]
    rows = [
        Row(
            [
                _target(attack), attack["attack"], f"{attack['members']} + {attack['others']}",
                Cell(f"{attack['auc']:.3f}", strong=attack["leaks"]),
                interval(attack["auc_interval"]),
                percent(attack["tpr"]), interval(attack["tpr_interval"], 100),
            ]
        )
        for attack in facts["attacks"]
    ]  # fmt: skip
    title = "membership: members against others; TPR where at most 1 % of others are accused"
    return Table(columns, rows, title)


def sentence(facts: Mapping[str, Any]) -> str:
    """What came out, in a few sentences."""
    parts = []
    if "attacks" in facts:
        parts.append(_of_attacks(facts))
    if "mechanism" in facts:
        parts.append(_of_mechanism(facts["mechanism"]))
    return " ".join(parts)


def _of_mechanism(facts: Mapping[str, Any]) -> str:
    findings = facts["findings"]
    wrong = [finding for finding in findings if finding["verdict"] == "refuted"]
    if not wrong:
        return f"The mechanism passes all {len(findings)} tests."
    return (
        f"The mechanism is not the promised one: {len(wrong)} of {len(findings)} tests refute it. "
        + " ".join(finding["text"] for finding in wrong)
    )


def _of_attacks(facts: Mapping[str, Any]) -> str:
    leaks = [attack for attack in facts["attacks"] if attack["leaks"]]
    if leaks:
        worst = max(leaks, key=lambda attack: attack["auc"])
        text = (
            f"{len(leaks)} of {len(facts['attacks'])} attacks "
            f"{'finds' if len(leaks) == 1 else 'find'} members better than chance; "
            f"the best is {worst['attack']} on {_whose(worst)} with an AUC of {worst['auc']:.2f}."
        )
    else:
        text = f"None of {len(facts['attacks'])} attacks finds members better than chance."
    bounds, claim = _bounds(facts), facts["claim"]
    if bounds:
        place, bound = max(bounds.items(), key=lambda item: item[1]["epsilon"])
        where = f" (by {place})" if len(bounds) > 1 else ""
        seen = f"at least {bound['epsilon']:.2f}{where}" if bound["epsilon"] > 0 else "more than 0"
        shows = "Canaries show" if bound["epsilon"] > 0 else "Canaries do not show"
        text += f" {shows} that epsilon is {seen}"
        if claim is not None:
            text += f"; claimed is at most {claim['epsilon']:.3g}: {facts['verdict']}"
        text += "."
    if facts["promise"] and (claim is None or not bounds):
        text += f" {facts['promise']}"
    return text


def auc_figure(attacks: Sequence[Mapping[str, Any]]) -> Figure:
    """A dot and an interval for every attack."""
    rows = [
        Dot(
            f"{_whose(attack)}, {attack['attack']}", attack["auc"], attack["auc_interval"],
            color=PSEUDO if attack["leaks"] else STUDENT,
        )
        for attack in attacks
    ]  # fmt: skip
    return dots(rows, "AUC", zero=0.5)


@style()
def epsilon_figure(facts: Mapping[str, Any]) -> Figure:
    """What was shown, promised, and could have been seen, on one line."""
    claim = facts["claim"]
    bound = max(_bounds(facts).values(), key=lambda each: each["epsilon"])
    figure, axes = canvas(7.2, 1.5)
    shown, largest = bound["epsilon"], bound["largest"]
    axes.barh([0], [largest], height=0.5, color=TEACHER, alpha=0.25)
    axes.barh([0], [shown], height=0.5, color=PSEUDO)
    label = f"shown: at least {shown:.2f}" if shown > 0 else "shown: nothing"
    note(axes, label, (shown, 0.33), ha="left", va="bottom", fontsize=8, color=PSEUDO)
    visible = f"visible up to {largest:.2f}"
    note(axes, visible, (largest, -0.33), ha="right", va="top", fontsize=8, color=INK)
    if claim is not None:
        epsilon = claim["epsilon"]
        axes.axvline(epsilon, color=STUDENT, lw=2)
        label, look = f"claimed: at most {epsilon:.3g}", {"fontsize": 8, "color": STUDENT}
        note(axes, label, (epsilon, 0.75), (4, 0), ha="left", va="top", **look)
    axes.set_xlim(0, 1.35 * max(largest, 0 if claim is None else claim["epsilon"]))
    axes.set_ylim(-0.8, 0.8)
    axes.set_yticks([])
    axes.set_xlabel("epsilon")
    return figure


def _bound(facts: Mapping[str, Any]) -> list[Card]:
    claim, bounds = facts["claim"], _bounds(facts)
    claimed = "none" if claim is None else f"{claim['epsilon']:.3g}"
    of_noise = facts["training"]["mechanism"] is not None
    canary = "a picture of noise" if of_noise else "an image under a wrong label"
    taken = (
        " From its answers: how well the teacher knows each. From every step: how strongly the "
        "canary's gradient is in the noisy one."
        if len(bounds) > 1
        else ""
    )
    confidence = 100 * facts["bound"]["confidence"]
    rows = [
        ("claimed epsilon", *(claimed for _ in bounds)),
        *(
            (name, *(shown(bound) for bound in bounds.values()))
            for name, shown in {
                f"lower bound at {confidence:g} % confidence": lambda b: f"{b['epsilon']:.2f}",
                "largest bound that it could give": lambda b: f"{b['largest']:.2f}",
                "delta": lambda b: f"{b['delta']:g}",
                "canaries": lambda b: f"{b['canaries']}",
                "right guesses": lambda b: f"{b['right']} of {b['guesses']}",
            }.items()
        ),
    ]
    return [
        Card(
            "Epsilon: what was claimed and what was seen",
            " ".join(filter(None, (facts["promise"], VERDICTS[facts["verdict"]]))),
            [epsilon_figure(facts)],
        ),
        Card(
            "Epsilon from one training",
            f"Client {facts['client']}'s teacher ({facts['model']}) was trained once more "
            f"{_how(facts['training'])}; each canary, {canary}, was among its images by the toss "
            f"of a coin (Steinke, Nasr and Jagielski 2023).{taken}",
            table=plain([*words(""), *numbers(*bounds)], rows),
        ),
    ]


def _bounds(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was shown, by what it was taken from."""
    found = {"its answers": facts["bound"], "every step": facts.get("white_box")}
    return {name: bound for name, bound in found.items() if bound is not None}


def _how(training: Mapping[str, Any]) -> str:
    times, mechanism = count(training["rounds"], "round"), training["mechanism"]
    if mechanism is not None:
        return (
            f"for {times} with DP-SGD ({mechanism['steps']} steps a round, sampling rate "
            f"{mechanism['sample_rate']:.3g}, noise {mechanism['noise_multiplier']:.3g})"
        )
    randomised = training["label_epsilon"] is not None
    return f"for {times} with randomised labels" if randomised else f"for {times} without DP-SGD"


def _target(attack: Mapping[str, Any]) -> str:
    return " ".join(str(attack[key]) for key in ("target", "client") if attack[key] is not None)


def _whose(attack: Mapping[str, Any]) -> str:
    client = attack["client"]
    return attack["target"] + (", all clients" if client is None else f" of client {client}")
