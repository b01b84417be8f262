"""The way of the data has one direction: a module imports only what stands to its left."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import monailabel_dfqsam
from tests.fresh import printed

NAME = "monailabel_dfqsam"
PACKAGE = Path(monailabel_dfqsam.__file__).parent

# Left to right. Names in one group do not import each other.
ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(group.split())
    for group in (
        "agreement config files machine masks numbers ops",
        "identity memory",
        "console",
        "sam",
        "synthesis",
        "pretraining",
        "quantization",
        "artifact",
        "engines",
        "segmentation",
        "export phantom_study",
        "faithful fidelity",
        "pipeline",
        "finetuning",
        "server",
        "evaluation report slicer_session",
        "demo",
        "benchmark doctor quantize_command",
        "cli",
        "__main__",
    )
)

# The training process, which MONAI Label starts from a server module, writes the report.
DEFERRED_EXCEPTIONS = {("server", "report")}

# What a server that only answers clicks never loads.
NOT_FOR_CLICKS = ("synthesis", "pretraining", "pipeline", "finetuning", "report")

# What a start does not wait for: upstream's, and of ours what only a volume or an archive's label needs.
NOT_FOR_A_START = (
    "monai", "ignite", "mlflow", "torchvision", "pandas", "matplotlib", "skimage", "sklearn", "itk",
    "openvino", "brevitas", "jinja2", "sympy", "triton", "torch._dynamo", "torch.distributed.tensor",
    "scipy.signal", "scipy.stats", "pydicom.sr", "highdicom",
)  # fmt: skip


def rank(name: str) -> int:
    found = [i for i, group in enumerate(ORDER) if name in group]
    assert found, f"'{name}' has no place in ORDER: give it one"
    return found[0]


def unit(path: Path) -> str:
    """'sam' for sam/vit.py, 'cli' for cli.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(imported unit, line, whether the import does not run when the module is loaded) of a module."""
    package = [NAME, *path.relative_to(PACKAGE).parts[:-1]]
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, deferred: bool) -> None:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        for parts in (target.split(".") for target in targets):
            is_unit = len(parts) > 1 and (
                (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
            )
            if parts[0] == NAME and is_unit:
                found.append((parts[1], node.lineno, deferred))  # type: ignore[attr-defined]
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
        for child in ast.iter_child_nodes(node):
            visit(child, deferred or inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_to_its_left(path: Path) -> None:
    own = unit(path)
    wrong = [
        f"line {line}: {own} imports {other}"
        for other, line, deferred in imports(path)
        if other != own
        and rank(other) >= rank(own)
        and not (deferred and (own, other) in DEFERRED_EXCEPTIONS)
    ]
    assert not wrong


def test_server_modules_do_not_import_synthesis_or_pretraining_when_loaded() -> None:
    wrong = [
        f"{path.name}:{line} imports {other}"
        for path in MODULES
        if unit(path) == "server"
        for other, line, deferred in imports(path)
        if other in NOT_FOR_CLICKS and not deferred
    ]
    assert not wrong


def test_one_package_knows_the_inside_of_monai_label() -> None:
    """What it offers to apps may be used by all; its endpoints and datastores are its own."""
    wrong = [
        f"{path.relative_to(PACKAGE)} names {inside}"
        for path in MODULES
        if path.relative_to(PACKAGE).parts[:2] != ("server", "upstream")
        for inside in ("monailabel.endpoints", "monailabel.datastore", "monailabel.utils.sessions")
        if inside in path.read_text(encoding="utf-8")
    ]
    assert not wrong


def test_loading_the_server_loads_no_synthesis() -> None:
    """The same by running it, since an import can hide behind others."""
    code = (
        "import sys, monailabel_dfqsam.server.app\n"
        f"print([n for n in {NOT_FOR_CLICKS!r} if any(m.startswith(f'{NAME}.{{n}}') for m in sys.modules)])"
    )
    assert printed(code).splitlines()[-1] == "[]"


def test_a_start_loads_no_more_than_clicks_need() -> None:
    code = (
        "import sys\n"
        "from monailabel_dfqsam.server.upstream import imports\n"
        "imports.defer()\n"
        "import monailabel.main, monailabel.app, monailabel_dfqsam.server.app\n"
        f"print([name for name in {NOT_FOR_A_START!r} if name in sys.modules])"
    )
    assert printed(code).splitlines()[-1] == "[]"


def test_quantizing_loads_no_monai_label() -> None:
    """So that its process can have no datastore."""
    code = (
        "import sys, monailabel_dfqsam.server.runs.process, monailabel_dfqsam.pipeline, "
        "monailabel_dfqsam.report; print('monailabel' in sys.modules)"
    )
    assert printed(code).split() == ["False"]


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, monailabel_dfqsam.cli; print('torch' in sys.modules, 'monailabel' in sys.modules)"
    assert printed(code).split() == ["False", "False"]


def test_the_check_itself_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, plain, from-package and deferred imports are all found."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for name in ("sam", "server", "synthesis"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.py").touch()
    module = tmp_path / "sam" / "module.py"
    module.write_text(
        "import monailabel_dfqsam.server.app\n"
        "from monailabel_dfqsam import config\n"
        "from ..synthesis import losses\n"
        "import os, json\n"
        "def f():\n"
        "    from monailabel_dfqsam.synthesis import synthesize\n"
        "if TYPE_CHECKING:\n"
        "    from monailabel_dfqsam.sam import model\n"
    )
    assert imports(module) == [
        ("server", 1, False),
        ("config", 2, False),
        ("synthesis", 3, False),
        ("synthesis", 6, True),
        ("sam", 8, True),
    ]
