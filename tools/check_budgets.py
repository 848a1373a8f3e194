"""Holds the size budgets of DESIGN section 6: `python tools/check_budgets.py [ROOT ...]`, default src/.

Functions: 90 % within 30 lines, none over 80, at most 6 parameters (self and cls not counted). Files: 90 % within 350
lines, none over 600. No file or folder called utils, common, helpers or misc. Import cycles are import-linter's job.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FUNCTION_P90, FUNCTION_MAX = 30, 80
FILE_P90, FILE_MAX = 350, 600
PARAMETERS_MAX = 6
BANNED_NAMES = {"utils", "common", "helpers", "misc"}


@dataclass(frozen=True, slots=True)
class Sized:
    """Something with a length: a function or a file."""

    where: str
    lines: int


def check(root: Path) -> list[str]:
    """Every broken budget under `root`, as a sentence that names the place."""
    paths = sorted(root.rglob("*.py"))
    files: list[Sized] = []
    functions: list[Sized] = []
    problems = [f"{path}: the name says nothing; name the noun it holds" for path in paths if _banned(path, root)]
    for path in paths:
        text = path.read_text()
        files.append(Sized(str(path), text.count("\n")))
        for function in _functions(ast.parse(text, str(path))):
            where = f"{path}:{function.lineno} {function.name}"
            functions.append(Sized(where, (function.end_lineno or function.lineno) - function.lineno + 1))
            if (count := _num_parameters(function)) > PARAMETERS_MAX:
                problems.append(f"{where}: {count} parameters (budget {PARAMETERS_MAX})")
    problems += _over("functions", functions, FUNCTION_P90, FUNCTION_MAX)
    problems += _over("files", files, FILE_P90, FILE_MAX)
    return problems


def _banned(path: Path, root: Path) -> bool:
    return not BANNED_NAMES.isdisjoint([*path.relative_to(root).parent.parts, path.stem])


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    if named and named[0].arg in {"self", "cls"}:
        named = named[1:]
    return len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def _over(what: str, sized: Sequence[Sized], p90_budget: int, max_budget: int) -> list[str]:
    if not sized:
        return [f"no {what} found"]
    ordered = sorted(sized, key=lambda each: each.lines)
    p90 = ordered[math.ceil(0.9 * len(ordered)) - 1].lines
    print(f"{what}: {len(ordered)}, p90 {p90} lines (budget {p90_budget}), largest {ordered[-1].lines} ({max_budget})")
    problems = [
        f"{each.where}: {each.lines} lines (budget {max_budget})" for each in ordered if each.lines > max_budget
    ]
    if p90 > p90_budget:
        largest = "".join(f"\n    {each.lines:4d}  {each.where}" for each in ordered[-10:])
        problems.append(f"{what}: p90 is {p90} lines (budget {p90_budget}); the largest are{largest}")
    return problems


def main() -> int:
    roots = [Path(argument) for argument in sys.argv[1:]] or [Path("src")]
    problems = [problem for root in roots for problem in check(root)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"size budgets: {len(problems)} broken" if problems else "size budgets: kept")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
