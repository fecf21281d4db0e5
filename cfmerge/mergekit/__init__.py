"""mergekit's YAML as recipes of cfmerge: `config` reads it, `parameters` and `translate` turn it into recipes."""

from cfmerge.mergekit.config import is_mergekit as is_mergekit
from cfmerge.mergekit.translate import Stage as Stage
from cfmerge.mergekit.translate import is_file as is_file
from cfmerge.mergekit.translate import load as load
from cfmerge.mergekit.translate import located as located
from cfmerge.mergekit.translate import needed_by as needed_by
from cfmerge.mergekit.translate import translated as translated
