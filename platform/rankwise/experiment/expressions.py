"""Expressions (`2*r`) and conditions (`lora.r <= 16 and seed == 0`) over the fields of a definition.

Python's parser builds the tree, but no Python runs: only the node types listed here are evaluated. A name is a field's
full path (`training.max_steps`), or its last part if that is unambiguous: a field of the same section (`r` in `lora`),
a field at the top (`seed`), or the only field of that name.
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
    """Raised when a text is not an expression, or cannot be evaluated."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression. `names` are the field names in it, as written."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, *, condition: bool = False) -> Expression:
        """Parse and check a text; `condition` allows comparisons, text and lists.

        Raises:
            ExpressionError: The text is not an allowed expression.
        """
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"longer than {MAX_LENGTH} characters")
        try:
            with warnings.catch_warnings():
                # The parser warns about the style of texts such as "1or r", which are checked below.
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
        """Evaluate with a value for each of `names`.

        Raises:
            ExpressionError: Division by zero, a result out of range, or unsuitable types.
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
    """The dotted name, such as `lora.r`, of a name or attribute chain."""
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
    """Refuse arithmetic on text: '*' would repeat it, '%' would format it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"arithmetic with {value!r}")
    return value


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    left, right = _number(left), _number(right)
    whole_power = isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int) and right > 0
    # 9**9**9 would exhaust memory before its result could be refused.
    if whole_power and left.bit_length() * right > MAX_BITS:
        raise OverflowError
    result = _BINARY[type(op)](left, right)
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise OverflowError
    return result


class Unresolved(Exception):
    """Raised when a field that an expression needs is invalid, which is reported at that field."""


class _CircularReference(ExpressionError):
    def __init__(self, members: list[str]) -> None:
        super().__init__(f"it depends on itself: {' -> '.join([*members, members[0]])}")
        self.members = members


@dataclass(kw_only=True)
class Resolution:
    """Data with numbers in place of expressions, and the problems of those that cannot be evaluated."""

    data: dict[str, Any]
    expressions: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    """Fields whose expression has a problem, or depends on a field that has one."""
    dependencies: dict[str, set[str]] = field(default_factory=dict)
    """Fields that each expression depends on, directly or through other expressions."""


def resolve(data: Mapping[str, Any]) -> Resolution:
    """Evaluate every text at a field that expects a number."""
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
            result.dependencies[path] = resolver.dependencies[path]
            put(result.data, key, value)
    return result


def evaluate_condition(condition: Expression, data: Mapping[str, Any]) -> bool:
    """Whether resolved data meets a condition.

    Raises:
        ExpressionError: A name is not a field, or the result is not true or false.
        Unresolved: A field in it is missing or invalid.
    """
    values = {}
    for name in condition.names:
        path = find_field(name, "")
        value = _lookup(data, path)
        # Lists of modules are compared regardless of order.
        values[name] = sorted(value) if isinstance(value, (list, tuple)) else value
    result = condition.evaluate(values)
    if not isinstance(result, bool):
        raise ExpressionError(f"must give true or false, gives {show(result)}")
    return result


def find_field(name: str, section: str) -> str:
    """The dotted path of the field that a name in an expression refers to.

    Raises:
        ExpressionError: No field or several fields have this name.
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
        self.dependencies: dict[str, set[str]] = {}
        self.texts = {path: text for path in numbers() if isinstance(text := _peek(data, path), str)}

    def value(self, path: str) -> Any:
        if path not in self.texts:
            value = _lookup(self.data, path)
            if path in numbers() and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise Unresolved
            return value
        if path not in self.values:
            if path in self.stack:
                raise _CircularReference(self.stack[self.stack.index(path) :])
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
        self.dependencies[path] = set()
        result = expression.evaluate({name: self._operand(name, section) for name in expression.names})
        if isinstance(result, float) and result.is_integer() and numbers()[path] == "integer":
            return int(result)
        return result

    def _operand(self, name: str, section: str) -> Any:
        path = find_field(name, section)
        try:
            value = self.value(path)
        except _CircularReference as error:
            # Each member of the cycle reports it; expressions that only depend on a member do not.
            if self.stack[-1] in error.members:
                raise
            raise Unresolved from None
        except ExpressionError:
            # The other expression's problem is reported at its own field.
            if path in self.texts:
                raise Unresolved from None
            raise
        self.dependencies[self.stack[-1]] |= {path, *self.dependencies.get(path, ())}
        return value


def _peek(data: Mapping[str, Any], path: str) -> Any:
    key = as_path(path)
    reached, value = follow(data, key)
    return value if reached == len(key) else None
