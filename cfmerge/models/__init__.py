"""Knowledge of models: kinds of tensors and their layouts, families, heads, ties, buffers, other names."""

from cfmerge.models.buffers import is_attention_mask as is_attention_mask
from cfmerge.models.buffers import is_buffer as is_buffer
from cfmerge.models.buffers import is_counter as is_counter
from cfmerge.models.heads import is_head as is_head
from cfmerge.models.kinds import Kind as Kind
from cfmerge.models.kinds import Parameter as Parameter
from cfmerge.models.kinds import classify as classify
from cfmerge.models.kinds import is_float as is_float
from cfmerge.models.layouts import Shape as Shape
from cfmerge.models.layouts import check_layout as check_layout
from cfmerge.models.layouts import from_canonical as from_canonical
from cfmerge.models.layouts import matrices_back as matrices_back
from cfmerge.models.layouts import matrices_first as matrices_first
from cfmerge.models.layouts import to_canonical as to_canonical
