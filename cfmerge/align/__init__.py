"""Models of different initialisation: how the neurons of one correspond to those of another.

Networks that were trained from different seeds have the same neurons in another order, at best. Everything else in
cfmerge takes experts of one base; this room finds the order first (Git Re-Basin, C2M3, activations, optimal transport),
or merges features within and across the models (ZipIt!).
"""

from cfmerge.align.activation_matching import activation_matching as activation_matching
from cfmerge.align.c2m3 import Universe as Universe
from cfmerge.align.c2m3 import between as between
from cfmerge.align.c2m3 import universe as universe
from cfmerge.align.chains import chain_spaces as chain_spaces
from cfmerge.align.checking import check_spaces as check_spaces
from cfmerge.align.groups import Groups as Groups
from cfmerge.align.groups import identity_match as identity_match
from cfmerge.align.merge_many import Many as Many
from cfmerge.align.merge_many import merge_many as merge_many
from cfmerge.align.moments import Moments as Moments
from cfmerge.align.ot_fusion import Fused as Fused
from cfmerge.align.ot_fusion import ot_fusion as ot_fusion
from cfmerge.align.permuting import Permutations as Permutations
from cfmerge.align.permuting import check_permutations as check_permutations
from cfmerge.align.permuting import compose as compose
from cfmerge.align.permuting import identity as identity
from cfmerge.align.permuting import inverse as inverse
from cfmerge.align.permuting import permute as permute
from cfmerge.align.permuting import permute_tensor as permute_tensor
from cfmerge.align.permuting import random_permutations as random_permutations
from cfmerge.align.space_moments import SpaceMoments as SpaceMoments
from cfmerge.align.traced import trace_spaces as trace_spaces
from cfmerge.align.traced import why_fixed as why_fixed
from cfmerge.align.weight_matching import Matching as Matching
from cfmerge.align.weight_matching import weight_matching as weight_matching
from cfmerge.align.zipit import match as match
from cfmerge.align.zipit import permutation_match as permutation_match
from cfmerge.align.zipped import Zipped as Zipped
from cfmerge.align.zipped import load_zipped as load_zipped
from cfmerge.align.zipping import zip_models as zip_models
from cfmerge.models.space_tables import Described as Described
from cfmerge.models.space_tables import describe as describe
from cfmerge.models.space_tables import read_table as read_table
from cfmerge.models.space_tables import spaces_of as spaces_of
from cfmerge.models.space_tables import write_table as write_table
from cfmerge.models.spaces import Spaces as Spaces
from cfmerge.models.spaces import parse_spaces as parse_spaces
