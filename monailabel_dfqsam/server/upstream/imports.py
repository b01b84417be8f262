"""Starts MONAI Label without MONAI, whose import is most of the time that a server takes to start.

MONAI imports all that it has, with ignite, mlflow, torchvision, pandas, matplotlib and scikit-learn. MONAI
Label uses it for bundles, downloads and some conversions, not to start and not to answer clicks. In the
modules of MONAI Label that are named here, an import of MONAI or ITK at the top moves into those functions
that use what it imports: what runs is upstream's code and the true MONAI, only later.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

_LATER = frozenset({"monai", "itk"})
_WHERE = frozenset(
    f"monailabel.{name}"
    for name in (
        "datastore.utils.convert", "interfaces.app", "interfaces.utils.wsi", "tasks.train.bundle",
        "transform.writer", "utils.others.generic",
    )
)  # fmt: skip

_Import = ast.Import | ast.ImportFrom
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def defer() -> None:
    """From now on, the modules named here import MONAI and ITK when a function needs them."""
    sys.meta_path.insert(0, _Finder())


def moved(tree: ast.Module) -> ast.Module:
    """A module whose imports of `_LATER` stand in the functions that use them; changes `tree`.

    An import stays where it is when the module itself needs one of its names to be loaded.
    """
    needed = {node.id for part in _when_loaded(tree) for node in ast.walk(part) if isinstance(node, ast.Name)}
    later = [node for node in tree.body if _is_heavy(node) and not needed & _names(node)]
    tree.body = [node for node in tree.body if node not in later]
    for function in _functions(tree):
        used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        start = 0 if ast.get_docstring(function, clean=False) is None else 1
        function.body[start:start] = [node for node in later if used & _names(node)]
    return tree


def _is_heavy(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(alias.name.partition(".")[0] in _LATER for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _LATER


def _names(node: ast.stmt) -> set[str]:
    """What an import binds."""
    assert isinstance(node, _Import)
    return {alias.asname or alias.name.partition(".")[0] for alias in node.names}


def _functions(node: ast.AST) -> Iterator[_Function]:
    """Of a module and its classes, not those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        else:
            yield from _functions(child)


def _when_loaded(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is loaded: all but the bodies of its functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield from (child.args, *child.decorator_list, *filter(None, [child.returns]))
        elif isinstance(child, ast.expr):
            yield child
        else:
            yield from _when_loaded(child)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Without the byte code beside the file, which is that of the imports at the top."""
        path = self.get_filename(fullname)
        code: CodeType = compile(moved(ast.parse(self.get_data(path))), path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WHERE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec
