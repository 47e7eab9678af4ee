"""What a study comes to: its table, from what is finished."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedkd.studies.central.folder import Record, StudyFolder


def results(folder: StudyFolder) -> Record:
    """The study's table, from what is finished."""
    study = folder.study
    teachers = []
    for number, source in enumerate(study.teachers):
        seeds = study.seeds if study.teachers_per_seed else study.seeds[:1]
        found = [folder.teacher(number, seed).result() for seed in seeds]
        teachers.append({"model": source.model.name, "source": source.checkpoint, **_row(found)})
    methods = {}
    for name, method in study.runs().items():
        found = [folder.student(name, seed).result() for seed in study.seeds]
        methods[name] = {
            "losses": [{"name": t.name, "weight": t.weight} for t in method.losses],
            "assistants": [model.name for model in study.assistants_of(name)],
            "guidance": study.guidance_of(name) if study.assistants_of(name) else None,
            "seeds": {str(r["seed"]): r for r in found if r is not None},
            **_row(found),
        }
    finished = all(len(row["seeds"]) == len(study.seeds) for row in methods.values())
    return {
        "name": study.name,
        "dataset": study.data.dataset.name,
        "student": study.student.model.name,
        "finished": finished,
        "teachers": teachers,
        "methods": methods,
    }


def _row(found: Sequence[Record | None]) -> Record:
    """Mean and sample deviation over the seeds that are finished."""
    done = [result for result in found if result is not None]
    row: Record = {"parameters": done[0]["parameters"] if done else None}
    for key in ("last", "best"):
        row[key] = _spread([result[key] for result in done])
    for key in ("images_per_second", "seconds"):
        known = [result[key] for result in done if result.get(key) is not None]
        row[key] = statistics.fmean(known) if known else None
    return row


def _spread(values: Sequence[float]) -> Record | None:
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}
