"""The library uses only names of torch that exist in 2.6, the oldest version that pyproject.toml admits.

The tests run with torch 2.13, so they compare with a list: tests/torch_names.txt has the names and keywords that the
library uses, and other common functions. All were looked up in torch 2.6.0. `python -m tests.test_torch_names` updates
the list; look up the names that it adds in torch's documentation.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "torch_names.txt"
# Newer names: the version that added them, and the guard that a file using them must contain.
GUARDED = {
    "torch.bmm(out_dtype)": ("2.8", "WIDE_PRODUCTS"),
    "torch.baddbmm(out_dtype)": ("2.8", "WIDE_PRODUCTS"),
}


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else None
    return node.id if isinstance(node, ast.Name) else None


def imported(tree: ast.AST) -> dict[str, str]:
    """Local names of imported torch modules and objects -> their names in torch."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    found[name.asname or "torch"] = name.name if name.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found.update({name.asname or name.name: f"{node.module}.{name.name}" for name in node.names})
    return found


def names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of torch in the code, and function(keyword) for each keyword passed to one of its functions."""
    known = imported(tree)
    yield from known.values()

    def whole(node: ast.AST) -> str | None:
        head, _, rest = (dotted(node) or "").partition(".")
        name = f"{known[head]}.{rest}" if rest and head in known else known.get(head)
        return None if name is None or name.startswith("torch.ops.mi_kernels") else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := whole(node)):
            yield name
        elif isinstance(node, ast.Call) and (name := whole(node.func)):
            yield from (f"{name}({keyword.arg})" for keyword in node.keywords if keyword.arg)


def used() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "mi_kernels").rglob("*.py")):
        for name in set(names(ast.parse(path.read_text()))):
            found.setdefault(name, []).append(path)
    return found


def test_names_of_torch_are_in_the_list() -> None:
    known = set(LIST.read_text().split())
    assert not sorted(set(used()) - known - set(GUARDED)), "if torch 2.6 has them: python -m tests.test_torch_names"


def test_younger_names_are_guarded() -> None:
    found = used()
    for name, (_, guard) in GUARDED.items():
        for path in found[name]:
            assert guard in path.read_text(), f"{path.relative_to(ROOT)} uses {name} without {guard}"


def test_listed_names_exist_here() -> None:
    import torch.distributed
    import torch.nn.utils.parametrize

    for name in LIST.read_text().split():
        reduce(getattr, name.partition("(")[0].split(".")[1:], torch)


def test_aliases_and_keywords_are_seen() -> None:
    code = "import torch\nfrom torch import nn\nnn.functional.pad(torch.mm(x, y, out=z), (0, 1))\nother.mm(k=1)\n"
    assert set(names(ast.parse(code))) == {
        "torch", "torch.nn", "torch.nn.functional", "torch.nn.functional.pad", "torch.mm", "torch.mm(out)",
    }  # fmt: skip


def test_types_are_asked_for_in_tuples() -> None:
    """In torch 2.6, ``isinstance(value, int | str)`` causes a graph break in torch.compile; a tuple does not."""
    for path in sorted((ROOT / "mi_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                assert not isinstance(node.args[1], ast.BinOp), f"{path.relative_to(ROOT)}:{node.lineno}"


if __name__ == "__main__":
    LIST.write_text("\n".join(sorted({*LIST.read_text().split(), *used()} - set(GUARDED))) + "\n")
