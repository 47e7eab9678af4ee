"""The images of a run, found again and compared with those that it began with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from fedkd.build import build_data, data_root
from fedkd.data.splits import FederatedData
from fedkd.runs.directory import RunDirectory
from fedkd.runs.signature import check_images, read_signature

Made = TypeVar("Made")


def found_again(
    run: RunDirectory, make: Callable[[str | None], Made], data: Callable[[Made], FederatedData]
) -> Made:
    """Something made of a run's images: from where they were, else from where they are today.

    Args:
        run: A run.
        make: Makes it, with the folder that relative data paths start from; None: today's.
        data: The images in what was made.

    Raises:
        ConfigError: the images are not those of the run.
        FileNotFoundError: they are in neither place.
    """
    signature, first = read_signature(run), None
    places: list[str | None] = [None]
    if signature is not None and signature.root != str(data_root(run.experiment)):
        places.insert(0, signature.root)
    for place in places:
        try:
            made = make(place)
            check_images(run, data(made))
            return made
        except (FileNotFoundError, ValueError) as error:
            first = first or error
    assert first is not None
    raise first


def run_data(run: RunDirectory) -> FederatedData:
    """The images of a run. Raises as `found_again`."""
    run.import_plugins()
    return found_again(run, partial(build_data, run.experiment), lambda data: data)
