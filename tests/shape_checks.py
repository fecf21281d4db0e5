"""The shapes that annotations state are checked while tests run, by jaxtyping and beartype.

A function is wrapped anew each time its `def` is run, and methods are made of closures: what jaxtyping writes and
beartype compiles for that took a quarter of the time that tests take. So functions that state no shape, nor use the
name of one, are left to mypy. Checks hang on the signature alone (defaults are not checked), so equal signatures share
theirs.
"""

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtyping import _decorator, _import_hook, install_import_hook

ROOMS = ("*.py", "linalg/*.py", "methods/*.py", "compose/*.py", "temporal/*.py")
SHAPE = re.compile(r"""\[[^][]+, ["']""")  # Float[Array, "m n"]


def install() -> None:
    """Has the functions that state shapes checked; to be called before `cfmerge` is imported.

    Those of the engine are not: it takes shapes that do not fit, and says so.
    """
    spec = importlib.util.find_spec("cfmerge")
    assert spec is not None
    package = Path(spec.submodule_search_locations[0])
    files = [file for room in ROOMS for file in package.glob(room) if '[Array, "' in file.read_text()]
    visit = _import_hook.JaxtypingTransformer.visit_FunctionDef
    _import_hook.JaxtypingTransformer.visit_FunctionDef = _only_shapes(visit, _names(files))
    _decorator._make_fn_with_signature = _once_by_signature(_decorator._make_fn_with_signature)
    _decorator._apply_typechecker = functools.cache(_decorator._apply_typechecker)
    _decorator._destring_annotation = _not_from_strings(_decorator._destring_annotation)
    modules = [".".join(("cfmerge", *file.relative_to(package).with_suffix("").parts)) for file in files]
    install_import_hook(modules, "beartype.beartype")


def _names(files: Iterable[Path]) -> set[str]:
    """The names that modules give to shapes: `Mask = Bool[Array, "..."]`."""
    statements = [one for file in files for one in ast.parse(file.read_text()).body if isinstance(one, ast.Assign)]
    return {target.id for one in statements if SHAPE.search(ast.unparse(one.value))
            for target in one.targets if isinstance(target, ast.Name)}  # fmt: skip


def _only_shapes(decorate: Any, names: set[str]) -> Any:
    """The visit of a `def` in a syntax tree, which is decorated only if it states a shape."""

    def states(annotation: ast.expr | None) -> bool:
        if annotation is None:
            return False
        used = {one.id for one in ast.walk(annotation) if isinstance(one, ast.Name)}
        return bool(SHAPE.search(ast.unparse(annotation)) or used & names)

    def visit(self: Any, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = [one.annotation for one in ast.walk(node.args) if isinstance(one, ast.arg)]
        if any(map(states, (*arguments, node.returns))):
            return decorate(self, node)
        self._parents.append(node)
        self.generic_visit(node)
        self._parents.pop()
        return node

    return visit


def _once_by_signature(make: Any) -> Any:
    made: dict[Any, Any] = {}

    def make_once(name: str, qualname: str, module: str, signature: inspect.Signature, output: bool) -> Any:
        own = [(one.name, one.kind, one.annotation, one.default is one.empty) for one in signature.parameters.values()]
        key = (name, qualname, module, *own, signature.return_annotation, output)
        if key not in made:
            made[key] = make(name, qualname, module, signature, output)
        return made[key]

    return make_once


def _not_from_strings(destring: Any) -> Any:
    """Annotations that hold no string are themselves what they stand for."""

    @functools.cache
    def plain(annotation: Any) -> bool:
        return destring(annotation, {}) == annotation

    def destrung(annotation: Any, names: dict[str, Any]) -> Any:
        try:
            same = plain(annotation)
        except TypeError:  # it has no hash
            same = False
        return annotation if same else destring(annotation, names)

    return destrung
