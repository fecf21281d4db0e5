"""Recipes: base, experts, method, rules and choices for doubtful cases, as the user asks for them, validated.

A recipe is a YAML file (or the front of a model card that cfmerge wrote, whose recipe it repeats). Paths are
relative to the current directory.
"""

from cfmerge.recipe.parts import Align as Align
from cfmerge.recipe.parts import Expert as Expert
from cfmerge.recipe.parts import LayerExpert as LayerExpert
from cfmerge.recipe.parts import Layers as Layers
from cfmerge.recipe.parts import Rename as Rename
from cfmerge.recipe.parts import Rule as Rule
from cfmerge.recipe.reading import load as load
from cfmerge.recipe.reading import parse as parse
from cfmerge.recipe.reading import parse_rule as parse_rule
from cfmerge.recipe.reading import parse_size as parse_size
from cfmerge.recipe.reading import rule_option as rule_option
from cfmerge.recipe.recipe import FILES as FILES
from cfmerge.recipe.recipe import Allowed as Allowed
from cfmerge.recipe.recipe import Format as Format
from cfmerge.recipe.recipe import Heads as Heads
from cfmerge.recipe.recipe import Recipe as Recipe
from cfmerge.recipe.shipped import Shipped as Shipped
from cfmerge.recipe.shipped import shipped as shipped
