"""A hash of the project's own code, for fingerprints and cache keys: an edit never gets results of older code."""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache
def code_hash(*names: str, folder: Path = PACKAGE) -> str:
    """SHA-256 of the syntax trees of these modules and packages.

    Comments, docstrings (those under attributes too) and formatting do not count. Each process reads the files once.

    Args:
        names: files and folders, relative to `folder`, such as `text.py` or `network`.
        folder: of the package.

    Raises:
        OSError: a file cannot be read.
        SyntaxError: a file is not Python.
    """
    found = hashlib.sha256()
    for path in sorted({path for name in names for path in _modules(folder / name)}):
        tree = _without_docstrings(ast.parse(path.read_bytes(), str(path)))
        found.update(f"{path.relative_to(folder).as_posix()} {ast.dump(tree)}\n".encode())
    return found.hexdigest()


def _modules(path: Path) -> list[Path]:
    """A module, or all those in a package without its hidden folders, such as a notebook's checkpoints."""
    if not path.is_dir():
        return [path]
    return [one for one in path.rglob("*.py") if not any(part.startswith(".") for part in one.relative_to(path).parts)]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree without strings that are statements of their own: they are documentation."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [one for one in body if not _is_string(one)]
    return tree


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
