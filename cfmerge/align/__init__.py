"""Models of different initialisation: how the neurons of one correspond to those of another.

Networks that were trained from different seeds have the same neurons in another order, at best. Everything else in
cfmerge takes experts of one base; this room finds the order first (Git Re-Basin, C2M3, activations, optimal transport),
or merges features within and across the models (ZipIt!).
"""

from cfmerge.align.permuting import Permutations as Permutations
from cfmerge.align.permuting import check_permutations as check_permutations
from cfmerge.align.permuting import compose as compose
from cfmerge.align.permuting import identity as identity
from cfmerge.align.permuting import inverse as inverse
from cfmerge.align.permuting import permute as permute
from cfmerge.align.permuting import permute_tensor as permute_tensor
from cfmerge.align.permuting import random_permutations as random_permutations
from cfmerge.models.space_tables import Described as Described
from cfmerge.models.space_tables import describe as describe
from cfmerge.models.space_tables import read_table as read_table
from cfmerge.models.space_tables import spaces_of as spaces_of
from cfmerge.models.spaces import Spaces as Spaces
from cfmerge.models.spaces import parse_spaces as parse_spaces
