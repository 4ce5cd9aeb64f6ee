"""Evaluates rules: expressions that can read metrics and do nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from random import random
from typing import Any

import simpleeval

from finetuning.config.validation.controller_rules import RULE_FUNCTIONS, is_huge_power
from finetuning.errors import ConfigError

_MOST_NODES = 100_000
_WRONG_TYPE = "Rule failed due to incorrect type usage"
_METHODS: dict[type, frozenset[str]] = {
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    str: frozenset({"lower", "upper", "strip", "startswith", "endswith"}),
}
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)


class MetricUnavailable(Exception):
    """A rule uses a value that does not exist yet. The message is the metric's name."""


class Expression:
    """The rule of one controller.

    Raises:
        ConfigError: the text is not an expression.
    """

    def __init__(self, text: str, controller: str):
        self._text = text
        self._controller = controller
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f'rule of controller "{controller}" is invalid: {error.msg}') from error
        self.names = frozenset(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name))

    def evaluate(self, metrics: Mapping[str, object]) -> bool:
        """Return whether the rule is true. A metric that was not computed yet is None.

        Raises:
            MetricUnavailable: the rule needs a value that does not exist yet.
            ConfigError: the result is not a boolean, or the rule uses something that is not allowed.
        """
        evaluator = _Evaluator(metrics)
        try:
            result = evaluator.eval(self._text, self._tree)
        except MetricUnavailable:
            raise
        except (simpleeval.InvalidExpression, ArithmeticError, ValueError, RecursionError) as error:
            raise self._failed(error) from error
        except (TypeError, AttributeError) as error:
            raise self._failed(error, _WRONG_TYPE) from error
        if result is None:
            raise MetricUnavailable("value")
        result = _plain_boolean(result)
        if not isinstance(result, bool):
            raise self._failed(f"the result is {str(result)[:80]}, not true or false", _WRONG_TYPE)
        return result

    def _failed(self, error: object, what: str = "Rule failed") -> ConfigError:
        return ConfigError(f'controller "{self._controller}": {what}: {error}. The rule is: {self._text.strip()}')


class _Evaluator(simpleeval.EvalWithCompoundTypes):
    """simpleeval's evaluator, with None as unavailable, limited time and size, and no methods that change a value."""

    def __init__(self, metrics: Mapping[str, object]):
        operators = {kind: _require_available(kind, function) for kind, function in _OPERATORS.items()}
        super().__init__(operators=operators, functions=dict(_FUNCTIONS), names=dict(metrics))
        self._nodes_left = _MOST_NODES

    def _eval(self, node: ast.AST) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise simpleeval.IterableTooLong("the evaluation takes too long")
        return super()._eval(node)

    def _check_disallowed_items(self, item: object) -> None:
        # The base class searches every container for forbidden functions: quadratic for a long history.
        if callable(item) and item in simpleeval.DISALLOW_FUNCTIONS:
            raise simpleeval.FeatureNotAvailable("This function is forbidden")

    def _eval_compare(self, node: ast.Compare) -> bool:
        """Return the result of a comparison; only one with a literal None may have a metric that does not exist yet."""
        operands = [node.left, *node.comparators]
        asks_for_none = any(isinstance(operand, ast.Constant) and operand.value is None for operand in operands)
        left = self._eval(node.left)
        for operator_node, before, after in zip(node.ops, operands, node.comparators, strict=False):
            right = self._eval(after)
            for value, operand in ((left, before), (right, after)):
                if value is None and not asks_for_none:
                    raise MetricUnavailable(_metric_of(operand))
            if not self.operators[type(operator_node)](left, right):
                return False
            left = right
        return True

    def _eval_subscript(self, node: ast.Subscript) -> object:
        container = self._eval(node.value)
        if container is None:
            raise MetricUnavailable(_metric_of(node))
        try:
            return container[self._eval(node.slice)]
        except LookupError:
            raise MetricUnavailable(_metric_of(node)) from None

    def _eval_attribute(self, node: ast.Attribute) -> object:
        value, name = self._eval(node.value), node.attr
        if name.startswith("_"):
            raise simpleeval.FeatureNotAvailable(f'"{name}" is not allowed')
        if value is None:
            raise MetricUnavailable(_metric_of(node))
        if name in _METHODS.get(type(value), ()):
            return getattr(value, name)
        if not isinstance(value, dict):
            raise simpleeval.FeatureNotAvailable(f'"{name}" of a value that is not a dictionary is not allowed')
        if name not in value:
            raise MetricUnavailable(_metric_of(node))
        return value[name]


def _metric_of(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _plain_boolean(result: object) -> object:
    """Return a boolean of numpy, or a tensor of one, as Python's."""
    dtype = getattr(result, "dtype", None)
    item = getattr(result, "item", None)
    is_boolean = str(dtype) in ("bool", "torch.bool") and getattr(result, "shape", None) == ()
    return item() if is_boolean and callable(item) else result


def _require_available(kind: type, function: Callable[..., object]) -> Callable[..., object]:
    """Make an operator raise MetricUnavailable for a None operand. `_eval_compare` does so for comparisons."""
    if kind in _COMPARISONS:
        return function

    def checked(*values: object) -> object:
        if any(value is None for value in values):
            raise MetricUnavailable("value")
        return function(*values)

    return checked


def _require_numbers(function: Callable[..., object]) -> Callable[..., object]:
    """Restrict an operator to numbers: with text or a list its result could be huge."""

    def checked(*values: object) -> object:
        if not all(isinstance(value, Real) for value in values):
            raise TypeError("a number is required here")
        return function(*values)

    return checked


def _power(base: float, exponent: float) -> float:
    if is_huge_power(base, exponent):
        raise simpleeval.NumberTooHigh(f"{base} ** {exponent} is too large")
    return base**exponent


def _sum(values: Iterable[object]) -> float:
    """Return the sum of numbers only: a sum of lists can be huge."""
    return sum(_number(value) for value in values)


def _number(value: object) -> float:
    if value is None:
        raise MetricUnavailable("value")
    if not isinstance(value, Real):
        raise TypeError("sum needs numbers")
    return float(value) if not isinstance(value, int) else value


def _require_values(function: Callable[..., object]) -> Callable[..., object]:
    """Make the minimum or maximum of an empty list unavailable: a history has no values before the first log."""

    def checked(*values: object) -> object:
        if len(values) == 1 and isinstance(values[0], list | tuple) and not values[0]:
            raise MetricUnavailable("value")
        return function(*values)

    return checked


_OPERATORS: dict[type, Callable[..., object]] = {
    **simpleeval.DEFAULT_OPERATORS,
    ast.Pow: _require_numbers(_power),
    ast.Mult: _require_numbers(operator.mul),
    ast.Mod: _require_numbers(operator.mod),
}
_FUNCTIONS: dict[str, Callable[..., object]] = {
    name: _require_available(ast.Call, function)
    for name, function in {
        "abs": abs,
        "all": all,
        "any": any,
        "len": len,
        "round": round,
        "sum": _sum,
        "min": _require_values(min),
        "max": _require_values(max),
        "int": int,
        "float": float,
        "str": str,
        "bool": bool,
        "rand": random,
        "randint": simpleeval.random_int,
        "math_trunc": math.trunc,
        "math_floor": math.floor,
        "math_ceil": math.ceil,
        "math_sqrt": math.sqrt,
        "math_isfinite": math.isfinite,
    }.items()
}
assert set(_FUNCTIONS) <= set(RULE_FUNCTIONS)
