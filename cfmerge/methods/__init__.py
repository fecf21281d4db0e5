"""Methods: how the deltas of one tensor become one delta."""

from cfmerge.methods._base import Entry as Entry
from cfmerge.methods._base import Method as Method
from cfmerge.methods._base import make as make
from cfmerge.methods._base import register as register
from cfmerge.methods._base import registry as registry
from cfmerge.methods.ace import ace as ace
from cfmerge.methods.sums import average as average
from cfmerge.methods.sums import task_arithmetic as task_arithmetic
