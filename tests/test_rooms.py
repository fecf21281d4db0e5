"""The rooms of the package: a module whose name begins with an underscore is known in its own room alone."""

import ast
from pathlib import Path

import cfmerge

PACKAGE = Path(cfmerge.__file__).parent


def imported(file: Path) -> list[str]:
    """Modules that a file imports, also by `from room import module`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_no_private_module_is_imported_from_another_room():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = ".".join(("cfmerge", *file.relative_to(PACKAGE).parent.parts))
        for module in imported(file):
            *above, last = module.split(".")
            if module.startswith("cfmerge.") and last.startswith("_") and not last.startswith("__"):
                private = PACKAGE.joinpath(*above[1:], f"{last}.py").is_file()
                wrong += [f"{file.name} imports {module}"] if private and ".".join(above) != room else []
    assert not wrong


def test_no_room_has_the_name_of_a_public_function():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    functions = {name for name in cfmerge.__all__ if callable(getattr(cfmerge, name))}
    assert not rooms & functions
