"""A rule's text to its verdict, in a language that can look at metrics and do nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
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
_COMPARES_WITH_NONE = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.Not)


class MetricUnavailable(Exception):
    """A rule looked at something that is not there yet; the message names it."""


class Expression:
    """One controller's rule.

    Raises:
        ConfigError: the text is no expression.
    """

    def __init__(self, text: str, controller: str):
        self._text = text
        self._controller = controller
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ConfigError(f'rule of controller "{controller}" is invalid: {error.msg}') from error
        self.names = frozenset(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name))

    def verdict(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the rule holds. Metrics that were not worked out yet are None.

        Raises:
            Unavailable: the rule cannot be decided yet.
            ConfigError: the rule is wrong: it gives no truth value, or asks for what is not allowed.
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
        if not isinstance(result, bool):
            raise self._failed(
                f"it gives {str(result)[:80]}, not true or false", "Rule failed due to incorrect type usage"
            )
        return result

    def _failed(self, error: object, what: str = "Rule failed") -> ConfigError:
        return ConfigError(f'controller "{self._controller}": {what}: {error}. The rule is: {self._text.strip()}')


class _Evaluator(simpleeval.EvalWithCompoundTypes):
    """simpleeval's, with None as what is not available, bounded in time and size, and without methods that change
    what they are called on."""

    def __init__(self, metrics: Mapping[str, Any]):
        operators = {kind: _known_only(kind, function) for kind, function in _OPERATORS.items()}
        super().__init__(operators=operators, functions=dict(_FUNCTIONS), names=dict(metrics))
        self._nodes_left = _MOST_NODES

    def _eval(self, node: ast.AST) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise simpleeval.IterableTooLong("it takes too long")
        return super()._eval(node)

    def _check_disallowed_items(self, item: Any) -> None:
        # Metrics hold plain values: looking through a long history at every node would be quadratic.
        if callable(item) and item in simpleeval.DISALLOW_FUNCTIONS:
            raise simpleeval.FeatureNotAvailable("This function is forbidden")

    def _eval_subscript(self, node: ast.Subscript) -> Any:
        container = self._eval(node.value)
        if container is None:
            raise MetricUnavailable(_metric_of(node))
        try:
            return container[self._eval(node.slice)]
        except LookupError:
            raise MetricUnavailable(_metric_of(node)) from None

    def _eval_attribute(self, node: ast.Attribute) -> Any:
        value, name = self._eval(node.value), node.attr
        if name.startswith("_"):
            raise simpleeval.FeatureNotAvailable(f'"{name}" is not allowed')
        if value is None:
            raise MetricUnavailable(_metric_of(node))
        if name in _METHODS.get(type(value), ()):
            return getattr(value, name)
        if not isinstance(value, dict):
            raise simpleeval.FeatureNotAvailable(f'"{name}" of a value that is no dictionary is not allowed')
        if name not in value:
            raise MetricUnavailable(_metric_of(node))
        return value[name]


def _metric_of(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _known_only(kind: type, function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, which has nothing to say about a value that is not available."""
    if kind in _COMPARES_WITH_NONE:
        return function

    def checked(*values: Any) -> Any:
        if any(value is None for value in values):
            raise MetricUnavailable("value")
        return function(*values)

    return checked


def _numbers_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, which could make something huge of a text or a list."""

    def checked(*values: Any) -> Any:
        if not all(isinstance(value, int | float) for value in values):
            raise TypeError("a number is needed here")
        return function(*values)

    return checked


def _power(base: Any, exponent: Any) -> Any:
    if is_huge_power(base, exponent):
        raise simpleeval.NumberTooHigh(f"{base} ** {exponent} is too large")
    return base**exponent


def _sum(values: Any) -> Any:
    """Python's, of numbers alone: a sum of lists can be huge."""
    return sum(_number(value) for value in values)


def _number(value: Any) -> Any:
    if value is None:
        raise MetricUnavailable("value")
    if not isinstance(value, int | float):
        raise TypeError("a sum is of numbers")
    return value


_OPERATORS: dict[type, Callable[..., Any]] = {
    **simpleeval.DEFAULT_OPERATORS,
    ast.Pow: _numbers_only(_power),
    ast.Mult: _numbers_only(operator.mul),
    ast.Mod: _numbers_only(operator.mod),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: _known_only(ast.Call, function)
    for name, function in {
        "abs": abs,
        "all": all,
        "any": any,
        "len": len,
        "round": round,
        "sum": _sum,
        "min": min,
        "max": max,
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
