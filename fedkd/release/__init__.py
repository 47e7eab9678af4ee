"""What a trusted aggregator lets out of the teachers' answers: one mechanism, one module."""

from fedkd.registry import Registry
from fedkd.release.base import Release

RELEASES: Registry[Release] = Registry("release", "fedkd.release")
