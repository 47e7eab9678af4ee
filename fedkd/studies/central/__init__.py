"""Distillation in one place: the benchmark everybody knows, teachers in the loop, all data at hand.

A *study* trains (or loads) teachers, and then one student by each of several methods and seeds.
"""
