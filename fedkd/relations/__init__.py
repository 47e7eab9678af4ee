"""Relations between samples and between classes, matched between student and teacher.

A graph's vertices are logit vectors, its edges the unit vectors from one vertex to another.
"""

from fedkd.relations.graphs import class_relation_loss, sample_relation_loss
from fedkd.relations.matching import Distance, Reduction
from fedkd.relations.pruning import Edges, Pruning, edge_scores

__all__ = [
    "Distance",
    "Edges",
    "Pruning",
    "Reduction",
    "class_relation_loss",
    "edge_scores",
    "sample_relation_loss",
]
