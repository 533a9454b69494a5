"""Which children a module's code calls with one and the same variable. It is read from the source: what a
call would show of one module (the keys of an attention may come from an encoder) need not hold for the next
call, and a recomputation has to decide as the first pass."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Iterable

from torch import nn

from .wrappers import innermost

__all__ = ["called_together"]

# A call of a child: the function, the list of statements it stands in, the variable it is given, how often
# that was assigned before.
Site = tuple[str, int, str, int]


def called_together(module: nn.Module, children: Iterable[str]) -> list[tuple[str, ...]]:
    """Of these children, in their order, those that the class calls side by side with one variable, wherever
    it calls them; each of two or more. What is called under conditions of its own, with an expression, or by
    code that is not there, is in none."""
    names = tuple(children)
    sites = _sites(type(module), frozenset(names))
    together: dict[frozenset[Site], list[str]] = {}
    for name in names:
        if sites.get(name):
            together.setdefault(frozenset(sites[name]), []).append(name)
    return [tuple(members) for members in together.values() if len(members) > 1]


@functools.lru_cache(maxsize=512)
def _sites(kind: type, children: frozenset[str]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        function = innermost(function) or function
        if isinstance(function, types.FunctionType) and children & set(function.__code__.co_names):
            for child, site in _calls(function):
                if child in children:
                    found.setdefault(child, []).append((name, *site))
    return found


def _calls(function: types.FunctionType) -> list[tuple[str, tuple[int, str, int]]]:
    """Every `self.child(variable)` in the function; none where its source is not there."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return []
    reader = _Reader(definition.args.args[0].arg)
    reader.visit(definition)
    return reader.calls


class _Reader(ast.NodeVisitor):
    """Goes through a function in the order of evaluation. A block is a run of code that is executed whole or
    not at all."""

    def __init__(self, me: str) -> None:
        self.me, self.block, self.blocks = me, 0, 0
        self.assigned: Counter[str] = Counter()
        self.calls: list[tuple[str, tuple[int, str, int]]] = []

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self._apart(*value)
            else:
                self._in_order(*(value if isinstance(value, list) else [value]))

    def _in_order(self, *nodes: object) -> None:
        for node in nodes:
            if isinstance(node, ast.AST):
                self.visit(node)

    def _apart(self, *nodes: ast.AST) -> None:
        outer, self.blocks = self.block, self.blocks + 1
        self.block = self.blocks
        self._in_order(*nodes)
        self.block = outer

    def _assignment(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr) -> None:
        self._in_order(node.value, *(node.targets if isinstance(node, ast.Assign) else [node.target]))

    visit_Assign = visit_AugAssign = visit_AnnAssign = visit_NamedExpr = _assignment

    def _own_block(self, node: ast.AST) -> None:
        self._apart(*ast.iter_child_nodes(node))

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _own_block

    def visit_For(self, node: ast.For) -> None:
        self._in_order(node.iter, node.target)
        self._apart(*node.body)
        self._apart(*node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._apart(node.body)
        self._apart(node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        for value in node.values[1:]:
            self._apart(value)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.assigned[node.id] += 1

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        callee, plain = (
            node.func,
            len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Name),
        )
        if (
            plain
            and isinstance(callee, ast.Attribute)
            and isinstance(callee.value, ast.Name)
            and callee.value.id == self.me
        ):
            variable = node.args[0].id
            self.calls.append((callee.attr, (self.block, variable, self.assigned[variable])))
