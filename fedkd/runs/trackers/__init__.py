"""Trackers that a run's events go to: one module for each, called as in the config."""

from fedkd.registry import Registry
from fedkd.runs.trackers.base import Tracker

TRACKERS: Registry[Tracker] = Registry("tracker", "fedkd.runs.trackers")
