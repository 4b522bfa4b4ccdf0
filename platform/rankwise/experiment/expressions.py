"""A tiny evaluator for values derived from others (`2*r`) and for conditions (`lora.r <= 16 and seed == 0`).

Python's parser makes the tree, but nothing of it is executed: only the node types listed here are understood.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LENGTH = 300
MAX_NODES = 100
MAX_BITS = 1024

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min, "max": max, "round": round, "abs": abs, "sqrt": math.sqrt,
}  # fmt: skip
_ALLOWED = "numbers, names of fields, + - * / // % **, min max round abs sqrt"
_CONDITIONS = f"{_ALLOWED}, comparisons, and, or, not, in"


class ExpressionError(ValueError):
    """Raised when a text is no expression, or cannot be computed."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression. `names` are the fields it needs, as they are written."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, *, condition: bool = False) -> Expression:
        """Parse and check a text; `condition` admits comparisons, texts and lists.

        Raises:
            ExpressionError: Its message fits after "is not an expression: ".
        """
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"longer than {MAX_LENGTH} characters")
        try:
            with warnings.catch_warnings():
                # "1or r" is refused below or computed; what the parser thinks of its style is of no use to anyone.
                warnings.simplefilter("ignore")
                tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ExpressionError(f"syntax; allowed are {_CONDITIONS if condition else _ALLOWED}") from error
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise ExpressionError(f"more than {MAX_NODES} parts")
        names: dict[str, None] = {}
        _check(tree, condition, names)
        return cls(text, tree, tuple(names))

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """The value, with `values` for all of `names`.

        Raises:
            ExpressionError: Division by zero, a result out of range, types that do not fit.
        """
        try:
            result = _evaluate(self.tree, values)
        except ZeroDivisionError as error:
            raise ExpressionError("division by zero") from error
        except (OverflowError, ValueError) as error:
            raise ExpressionError("the result is out of range") from error
        except TypeError as error:
            raise ExpressionError(f"the types do not fit ({error})") from error
        if isinstance(result, complex) or (isinstance(result, float) and not math.isfinite(result)):
            raise ExpressionError("the result is not a finite number")
        return result


def _name(node: ast.expr) -> str | None:
    """`lora.r` of an attribute chain over a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _name(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def _check(node: ast.expr, condition: bool, names: dict[str, None]) -> None:
    allowed = _CONDITIONS if condition else _ALLOWED
    children: list[ast.expr] = []
    name = _name(node)
    if name is not None:
        names[name] = None
        return
    match node:
        case ast.Constant(value=bool()) if condition:
            return
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return
        case ast.Constant(value=str()) if condition:
            return
        case ast.BinOp(left=left, right=right, op=op) if type(op) in _BINARY:
            children = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            children = [operand]
        case ast.UnaryOp(op=ast.Not(), operand=operand) if condition:
            children = [operand]
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in _FUNCTIONS:
            if not arguments or (function in {"abs", "sqrt"} and len(arguments) != 1):
                raise ExpressionError(f"{function}() with {len(arguments)} values")
            children = list(arguments)
        case ast.BoolOp(values=parts) if condition:
            children = parts
        case ast.Compare(left=left, comparators=others, ops=ops) if condition and all(type(o) in _COMPARE for o in ops):
            children = [left, *others]
        case ast.List(elts=parts) | ast.Tuple(elts=parts) if condition:
            children = parts
        case _:
            raise ExpressionError(f"{ast.unparse(node)!r} is not allowed; allowed are {allowed}")
    for child in children:
        _check(child, condition, names)


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    name = _name(node)
    if name is not None:
        return values[name]
    match node:
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right):
            return _arithmetic(op, _evaluate(left, values), _evaluate(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            value = _evaluate(operand, values)
            if isinstance(op, ast.Not):
                return not value
            return -_number(value) if isinstance(op, ast.USub) else _number(value)
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return _FUNCTIONS[function](*(_number(_evaluate(argument, values)) for argument in arguments))
        case ast.BoolOp(op=op, values=parts):
            decide = all if isinstance(op, ast.And) else any
            return decide(_evaluate(part, values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=others):
            items = [_evaluate(part, values) for part in (left, *others)]
            return all(_COMPARE[type(op)](items[i], items[i + 1]) for i, op in enumerate(ops))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part, values) for part in parts]
    raise AssertionError(f"unchecked node {node!r}")


def _number(value: Any) -> Any:
    """Arithmetic is for numbers: '*' on a text would repeat it, '%' would format it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"arithmetic with {value!r}")
    return value


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    left, right = _number(left), _number(right)
    whole_power = isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int) and right > 0
    # 9**9**9 would take the machine's memory before its result could be refused.
    if whole_power and left.bit_length() * right > MAX_BITS:
        raise OverflowError
    result = _BINARY[type(op)](left, right)
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise OverflowError
    return result
