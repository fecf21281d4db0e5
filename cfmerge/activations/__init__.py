"""What the layers of Flax models compute on a user's batches.

Input Grams of each model for RegMean and LOT; RegMean++, which collects as it merges; joint moments of the features of
several models for matching and ZipIt!; statistics of a merged model's channels set right (BatchNorm, REPAIR).
"""

from cfmerge.activations.collect import collect_linen as collect_linen
from cfmerge.activations.collect import collect_nnx as collect_nnx
from cfmerge.activations.collect import gram_of as gram_of
from cfmerge.activations.collect import load as load
from cfmerge.activations.collect import save as save
from cfmerge.activations.joint import collect_joint_linen as collect_joint_linen
from cfmerge.activations.joint import collect_joint_nnx as collect_joint_nnx
from cfmerge.activations.norms import reset_norms_linen as reset_norms_linen
from cfmerge.activations.norms import reset_norms_nnx as reset_norms_nnx
from cfmerge.activations.regmean_pp import regmean_pp as regmean_pp
from cfmerge.activations.repair import repair_linen as repair_linen
from cfmerge.activations.repair import repair_nnx as repair_nnx
from cfmerge.activations.spaces import linen_function as linen_function
from cfmerge.activations.spaces import nnx_function as nnx_function
from cfmerge.activations.spaces import spaces_of_linen as spaces_of_linen
from cfmerge.activations.spaces import spaces_of_nnx as spaces_of_nnx
