"""A tiny evaluator for values derived from others (`2*r`) and for conditions (`lora.r <= 16 and seed == 0`).

Python's parser makes the tree, but nothing of it is executed: only the node types listed here are understood.

A name is a field's full path (`training.max_steps`), or its last part where that says which one is meant: a field of
the same section (`r` in `lora`), a field at the top (`seed`), or the only field of that name.

- Expressions in a definition: which fields they name, and their values.
"""

from __future__ import annotations

import ast
import copy
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.experiment.document import Problem, scalar
from rankwise.experiment.fields import allowed, did_you_mean, get, leaves, numbers, show
from rankwise.experiment.paths import as_path, follow, put

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


class Unresolved(Exception):
    """A field that an expression needs is wrong itself; that is reported where it is wrong."""


class _Circle(ExpressionError):
    """Expressions that need each other."""

    def __init__(self, members: list[str]) -> None:
        super().__init__(f"it depends on itself: {' -> '.join([*members, members[0]])}")
        self.members = members


@dataclass(kw_only=True)
class Resolution:
    """Data with numbers in place of expressions, and what could not be resolved."""

    data: dict[str, Any]
    expressions: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """Fields whose expression has a problem, or needs a field that has one."""
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Fields that each expression needs, directly or through other expressions."""


def resolve(data: Mapping[str, Any]) -> Resolution:
    """Evaluate every expression that stands where a number is expected."""
    resolver = _Resolver(data)
    result = Resolution(data=copy.deepcopy(dict(data)))
    for path, text in resolver.texts.items():
        key = as_path(path)
        try:
            value = resolver.value(path)
        except ExpressionError as error:
            result.problems.append(
                Problem(path=key, text=f"must be {allowed(key)}, or an expression, got {show(text)}: {error}")
            )
            result.skipped.add(path)
        except Unresolved:
            result.skipped.add(path)
        else:
            result.expressions[path] = text
            result.needs[path] = resolver.needs[path]
            put(result.data, key, value)
    return result


def evaluate_condition(condition: Expression, data: Mapping[str, Any]) -> bool:
    """Whether resolved data meets a condition.

    Raises:
        ExpressionError: A name is no field, or the result is neither true nor false.
        Unresolved: A field that it names is not there or wrong.
    """
    values = {}
    for name in condition.names:
        path = find_field(name, "")
        value = _lookup(data, path)
        # A list of modules is compared as a whole, in any order.
        values[name] = sorted(value) if isinstance(value, (list, tuple)) else value
    result = condition.evaluate(values)
    if not isinstance(result, bool):
        raise ExpressionError(f"must be true or false, gives {show(result)}")
    return result


def find_field(name: str, section: str) -> str:
    """The dotted path of the field that a name in an expression means.

    Raises:
        ExpressionError: There is none, or more than one.
    """
    known = leaves()
    if section and f"{section}.{name}" in known:
        return f"{section}.{name}"
    if name in known:
        return name
    homes = [path for path in known if path.endswith(f".{name}")]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise ExpressionError(f"the name {name!r} can mean {', '.join(homes)}: write the full path")
    last_parts = {path.rpartition(".")[2] for path in known}
    candidates = known if "." in name else last_parts
    raise ExpressionError(f"there is no field {name!r}{did_you_mean(name, candidates)}")


def _lookup(data: Mapping[str, Any], path: str) -> Any:
    try:
        value = get(data, as_path(path))
    except KeyError as error:
        raise Unresolved from error
    if value is None:
        raise ExpressionError(f"{path} is null here")
    return value


class _Resolver:
    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.values: dict[str, Any] = {}
        self.stack: list[str] = []
        self.needs: dict[str, set[str]] = {}
        self.texts = {path: text for path in numbers() if isinstance(text := _peek(data, path), str)}

    def value(self, path: str) -> Any:
        if path not in self.texts:
            value = _lookup(self.data, path)
            if path in numbers() and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise Unresolved
            return value
        if path not in self.values:
            if path in self.stack:
                raise _Circle(self.stack[self.stack.index(path) :])
            self.stack.append(path)
            try:
                self.values[path] = self._evaluate(path)
            finally:
                self.stack.pop()
        return self.values[path]

    def _evaluate(self, path: str) -> Any:
        text = self.texts[path]
        if isinstance(scalar(text), (int, float)):
            raise ExpressionError("a number is written without quotes")
        expression = Expression.parse(text)
        section = path.rpartition(".")[0]
        self.needs[path] = set()
        result = expression.evaluate({name: self._operand(name, section) for name in expression.names})
        if isinstance(result, float) and result.is_integer() and numbers()[path] == "integer":
            return int(result)
        return result

    def _operand(self, name: str, section: str) -> Any:
        path = find_field(name, section)
        try:
            value = self.value(path)
        except _Circle as error:
            # Each member of a circle reports it; what only needs a member does not.
            if self.stack[-1] in error.members:
                raise
            raise Unresolved from None
        except ExpressionError:
            # The other expression's problem is reported at its own place.
            if path in self.texts:
                raise Unresolved from None
            raise
        self.needs[self.stack[-1]] |= {path, *self.needs.get(path, ())}
        return value


def _peek(data: Mapping[str, Any], path: str) -> Any:
    key = as_path(path)
    reached, value = follow(data, key)
    return value if reached == len(key) else None
