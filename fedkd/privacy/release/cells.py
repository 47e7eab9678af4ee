"""Cells of the transfer set: alike images, about which every client votes once.

A release pays for each question. Where it asks about cells instead of images, it asks few, and all
images of a cell get its answer. Cells come from public images alone, so that they cost nothing;
a client's ballot in a cell is one probability vector, as it is about an image, and costs the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedkd.data.features import basis_of
from fedkd.privacy.release.base import Released
from fedkd.randomness import stream_seed

# Of the features; few of them tell neighbours better than all pixels do (docs/privacy.md).
_DIRECTIONS = 16
# Images that are joined to each image in the graph.
_NEIGHBOURS = 10


@dataclass(frozen=True)
class Cells:
    """Which cell each image belongs to.

    Attributes:
        of: (N,), from 0 to K - 1; no cell is empty.
    """

    of: Tensor

    @classmethod
    def among(cls, images: Tensor, count: int, classes: int, seed: int) -> Self:
        """Of public images, uint8 (N, channels, height, width), by spectral clustering.

        Each image is joined to its nearest neighbours on the images' `Basis`, and k-means divides
        the leading eigenvectors of that graph, as many as there are classes. So a cell follows the
        shape of a class, where k-means on the features alone cuts balls out of it.

        Args:
            images: The images.
            count: How many cells, at most; fewer where images are the same.
            classes: How many classes the images have.
            seed: Seed of the run.

        References:
            Von Luxburg, "A Tutorial on Spectral Clustering", 2007,
                https://arxiv.org/abs/0711.0189
        """
        from sklearn.cluster import SpectralClustering  # here: a second, and only servers need it

        directions = min(_DIRECTIONS, len(images) - 1, images[0].numel())
        features = basis_of(images, directions)(images) if directions else torch.zeros(1, 1)
        count = min(count, len(features.unique(dim=0)))
        if count < 2:
            return cls(torch.zeros(len(images), dtype=torch.long))
        graph = SpectralClustering(
            count,
            n_components=min(classes, len(images) - 1),
            affinity="nearest_neighbors",
            n_neighbors=min(_NEIGHBOURS, len(images)),
            n_init=4,
            random_state=stream_seed(seed, "cells") % 2**32,
        )
        with warnings.catch_warnings():  # kinds that nothing joins are all the better apart
            warnings.filterwarnings("ignore", message="Graph is not fully connected")
            found = torch.from_numpy(graph.fit_predict(features.double().numpy())).long()
        return cls(found.unique(return_inverse=True)[1])

    def __len__(self) -> int:
        return int(self.of.max()) + 1

    def ballots(self, probabilities: Tensor) -> Tensor:
        """Each teacher's mean answer in each cell, (M, N, C) -> (M, K, C)."""
        teachers, _, classes = probabilities.shape
        total = probabilities.new_zeros(teachers, len(self), classes)
        total.index_add_(1, self.of, probabilities)
        return total / self.of.bincount()[:, None]

    def spread(self, released: Released) -> Released:
        """What came out about cells, for all images of those cells."""
        place = torch.full((len(self),), -1)
        place[released.index] = torch.arange(len(released.index))
        row = place[self.of]
        index = (row >= 0).nonzero().flatten()
        return Released(released.scores[row[index]], index, released.mu)
