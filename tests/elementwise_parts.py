"""Builders for tests of methods that take entries one by one."""

import numpy as np

import cfmerge


def deltas_of(seed=0, experts=3, shape=(6, 8)):
    return np.random.default_rng(seed).standard_normal((experts, *shape)).astype(np.float32)


def merge(method, deltas, **options):
    """The merged delta of a zero base."""
    return np.asarray(cfmerge.merge_tensor(np.zeros_like(deltas[0]), list(deltas), method, **options))
