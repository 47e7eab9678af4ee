"""A student as a folder for a model hub: weights, what they need to be used, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkd.config import ConfigError
from fedkd.io.tensors import load_state, save_tensors
from fedkd.models.build import build_model, is_known
from fedkd.models.network import Network

WEIGHTS, ABOUT, CARD = "model.safetensors", "config.json", "README.md"


def write_folder(
    network: Network,
    folder: Path,
    about: Mapping[str, Any],
    summary: Mapping[str, Any],
    recipe: Mapping[str, str],
) -> Network:
    """Write a student, and read it again.

    Args:
        network: The student; all of it learns.
        folder: Where the files are written; one that is there holds nothing else, or such files.
        about: What its signature says, and its temperature.
        summary: What the run came to; empty where that is not known.
        recipe: What it was trained with, for the card.

    Returns:
        The network that the written files are.

    Raises:
        ConfigError: safetensors is not installed, or the network cannot be made from its name.
    """
    if not is_known(str(about["student"]["name"])):
        raise ConfigError(
            f"--format safetensors: {about['student']['name']!r} is a plugin's model, of which a "
            "folder of weights is not enough; take --format torch or onnx"
        )
    if about.get("heads"):
        raise ConfigError(
            "--format safetensors: a student with several heads; take --format torch or onnx"
        )
    if network.base is not None:
        raise ConfigError(
            "--format safetensors: the student is adapters on a frozen network; take --format "
            "torch or onnx, which hold both"
        )
    folder.mkdir(exist_ok=True)
    save_tensors(folder / WEIGHTS, network.state_dict(), {"format": "pt"})
    text = json.dumps({"library_name": "fedkd", **about}, indent=2)
    (folder / ABOUT).write_text(f"{text}\n", encoding="utf-8")
    (folder / CARD).write_text(card(about, summary, recipe), encoding="utf-8")
    return read_folder(folder)[0]


def read_folder(folder: Path) -> tuple[Network, dict[str, Any]]:
    """The student in such a folder, and what is known of it. Raises `ConfigError`."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        pictures, model = about["pictures"], about["student"]
        options = {name: value for name, value in model.items() if name not in ("name", "weights")}
        network = build_model(
            model["name"],
            num_classes=len(about["classes"]),
            in_channels=pictures["channels"],
            image_size=pictures["height"],
            mean=about["mean"],
            std=about["std"],
            options=options,
        )
        network.load_state_dict(load_state(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder}: not a folder that fedkd export --format safetensors wrote ({reason})"
        ) from None
    return network.eval(), about


def card(about: Mapping[str, Any], summary: Mapping[str, Any], recipe: Mapping[str, str]) -> str:
    """The model card, as Markdown with the front matter that hubs read."""
    pictures, classes = about["pictures"], list(about["classes"])
    size = f"{pictures['height']} x {pictures['width']}"
    colour = "grey" if pictures["channels"] == 1 else "colour"
    lines = [
        "---",
        "library_name: fedkd",
        "pipeline_tag: image-classification",
        "tags: [image-classification, knowledge-distillation, federated-learning]",
        "# license: which one is yours to say; hubs ask for it here",
        "---",
        "",
        f"# {summary.get('name', 'student')}: {about['student']['name']}, distilled with fedkd",
        "",
        "One student, distilled from several teachers through their answers about a common "
        "transfer set ([fedkd](https://pypi.org/project/fedkd/)).",
        "",
        f"It tells {len(classes)} classes apart in {colour} pictures of {size} pixels: "
        f"{', '.join(map(str, classes[:20]))}{' …' if len(classes) > 20 else ''}.",
        "",
        "## Use",
        "",
        "```py",
        "import fedkd",
        "",
        'student = fedkd.load_student("this-folder")',
        'print(student.predict("photo.png"))  # [("class", probability), ...]',
        "```",
        "",
        "Pictures are turned upright, resized without regard to their aspect ratio (bilinear) and "
        "laid on white where transparent. Normalisation is inside. Probabilities are those of the "
        f"logits divided by {about.get('temperature', 1.0):.3g}.",
    ]
    lines += _numbers(summary)
    if recipe:
        lines += ["", "## Training", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in recipe.items()]
    lines += [
        "",
        "## Intended use and limits",
        "",
        "For pictures like those that the teachers and the transfer set held, and the classes "
        "above: everything else gets one of these classes too. Numbers hold for the test images "
        "alone. What the teachers' data allow, whom errors concern and who may use it is for its "
        "publisher to say here.",
    ]
    return "\n".join([*lines, ""])


def _numbers(summary: Mapping[str, Any]) -> list[str]:
    if not summary:
        return []
    student, tests = summary["student"], summary.get("test", {}).get("size")
    teachers = [t["accuracy"] for t in summary.get("teachers", []) if t.get("accuracy") is not None]
    rows = [("accuracy", _percent(student["accuracy"]))]
    if teachers:
        rows.append((f"best of {len(teachers)} teachers", _percent(max(teachers))))
    for key, name in (("ensemble", "all teachers, fused"), ("oracle", "oracle"),
                      ("ceiling", "ceiling")):  # fmt: skip
        value = summary.get(key)
        value = value.get("accuracy") if isinstance(value, Mapping) else value
        if value is not None:
            rows.append((name, _percent(value)))
    scaled = summary.get("temperature")
    if student.get("calibration") and scaled:
        before, after = student["calibration"]["ece"], scaled["calibration"]["ece"]
        rows.append(("calibration error (ECE)", f"{_percent(after)} ({_percent(before)} before)"))
    if privacy := summary.get("privacy"):
        rows.append(("privacy", f"{privacy['mechanism']}, epsilon {privacy['worst']:.3g}"))
    rows += [("parameters", f"{student['parameters']:,}"), ("hash", str(summary.get("hash", "")))]
    title = f"on {tests:,} test images" if tests else "on the test images"
    return ["", "## Numbers", "", f"| {title} | |", "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows)]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
