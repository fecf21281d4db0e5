"""Methods: how the deltas of one tensor become one delta; transforms, and chains of them."""

from cfmerge.methods._base import Context as Context
from cfmerge.methods._base import Found as Found
from cfmerge.methods._base import Method as Method
from cfmerge.methods._base import Seen as Seen
from cfmerge.methods._base import Survey as Survey
from cfmerge.methods._base import Transform as Transform
from cfmerge.methods._base import chain as chain
from cfmerge.methods._registry import Entry as Entry
from cfmerge.methods._registry import Number as Number
from cfmerge.methods._registry import PerExpert as PerExpert
from cfmerge.methods._registry import make as make
from cfmerge.methods._registry import register as register
from cfmerge.methods._registry import registry as registry
from cfmerge.methods.ace import ace as ace
from cfmerge.methods.sums import average as average
from cfmerge.methods.sums import task_arithmetic as task_arithmetic
