"""All linear algebra of cfmerge, and its precision policy; public, for methods of one's own.

Nobody else calls a decomposition. Products run at the full precision of their inputs' type (on GPU and TPU the
default would be TF32 or bfloat16); arrays stay in the dtype that they come in. Under `vmap` decompositions run one
after the other (`one_by_one`). All functions work under `jit` and `vmap`, and under `grad` where nothing else is said.

    products.py        products, norms, Grams
    solves.py          symmetric systems: Cholesky, pseudo-inverse, conjugate gradients
    spectra.py         LAPACK's decompositions
    low_rank.py        leading singular triplets, low-rank factors
    polar_factors.py   polar factors
    selection.py       the k-th largest entry, the k largest entries
    batching.py        decompositions under `vmap`
    sharing.py         solves whose right-hand sides several devices share out
    filled.py          arrays of one number, that loops start from
"""

from cfmerge.linalg.batching import one_by_one as one_by_one
from cfmerge.linalg.filled import filled as filled
from cfmerge.linalg.low_rank import leading as leading
from cfmerge.linalg.low_rank import low_rank_factors as low_rank_factors
from cfmerge.linalg.low_rank import nonzero as nonzero
from cfmerge.linalg.low_rank import rank_cutoff as rank_cutoff
from cfmerge.linalg.low_rank import span as span
from cfmerge.linalg.low_rank import svd as svd
from cfmerge.linalg.low_rank import truncated as truncated
from cfmerge.linalg.polar_factors import Polar as Polar
from cfmerge.linalg.polar_factors import polar as polar
from cfmerge.linalg.products import HIGHEST as HIGHEST
from cfmerge.linalg.products import gram as gram
from cfmerge.linalg.products import matmul as matmul
from cfmerge.linalg.products import norm as norm
from cfmerge.linalg.products import ratio as ratio
from cfmerge.linalg.products import root as root
from cfmerge.linalg.products import times_gram as times_gram
from cfmerge.linalg.products import unit as unit
from cfmerge.linalg.products import weighted_mean as weighted_mean
from cfmerge.linalg.products import weighted_sum as weighted_sum
from cfmerge.linalg.selection import kth_largest as kth_largest
from cfmerge.linalg.selection import largest as largest
from cfmerge.linalg.selection import magnitude_keys as magnitude_keys
from cfmerge.linalg.sharing import ROWS as ROWS
from cfmerge.linalg.solves import conjugate_gradients as conjugate_gradients
from cfmerge.linalg.solves import pseudo_inverse as pseudo_inverse
from cfmerge.linalg.solves import solve_right as solve_right
from cfmerge.linalg.spectra import complete_qr as complete_qr
from cfmerge.linalg.spectra import largest_eigenvalue as largest_eigenvalue
from cfmerge.linalg.spectra import orthonormal as orthonormal
from cfmerge.linalg.spectra import symmetric_eigen as symmetric_eigen
from cfmerge.linalg.spectra import thin_svd as thin_svd
