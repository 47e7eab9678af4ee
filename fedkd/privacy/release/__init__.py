"""What a trusted aggregator lets out of the teachers' answers: one mechanism, one module."""

from fedkd.privacy.release.base import Release
from fedkd.registry import Registry

RELEASES: Registry[Release] = Registry("release", "fedkd.privacy.release")
