"""Relations between samples and between classes, matched between student and teacher.

A graph's vertices are logit vectors, its edges the unit vectors from one vertex to another.
"""

from fedkd.functional.relations.graphs import (
    both_views,
    class_graph,
    class_relation_loss,
    reliable,
    sample_graph,
    sample_relation_loss,
)
from fedkd.functional.relations.matching import (
    Distance,
    Edges,
    Graph,
    Reduction,
    formula,
    match,
    solve,
)
from fedkd.functional.relations.pruning import Pruning, edge_scores

__all__ = [
    "Distance",
    "Edges",
    "Graph",
    "Pruning",
    "Reduction",
    "both_views",
    "class_graph",
    "class_relation_loss",
    "edge_scores",
    "formula",
    "match",
    "reliable",
    "sample_graph",
    "sample_relation_loss",
    "solve",
]
