"""Relations between samples and between classes, matched between student and teacher.

A graph's vertices are logit vectors, its edges the unit vectors from one vertex to another.
"""

from fedkd.functional.relations.gram import Coarse
from fedkd.functional.relations.graphs import (
    Compared,
    both_views,
    class_graph,
    reliable,
    sample_graph,
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
    "Coarse",
    "Compared",
    "Distance",
    "Edges",
    "Graph",
    "Pruning",
    "Reduction",
    "both_views",
    "class_graph",
    "edge_scores",
    "formula",
    "match",
    "reliable",
    "sample_graph",
    "solve",
]
