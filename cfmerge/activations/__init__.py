"""Inputs of the layers of Flax models: Grams for RegMean and LOT, and RegMean++, which collects as it merges."""

from cfmerge.activations.collect import collect_linen as collect_linen
from cfmerge.activations.collect import collect_nnx as collect_nnx
from cfmerge.activations.collect import gram_of as gram_of
from cfmerge.activations.collect import load as load
from cfmerge.activations.collect import save as save
from cfmerge.activations.regmean_pp import regmean_pp as regmean_pp
