"""Validate the rules of a trainer controller before anything is loaded. Expressions are parsed, not evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from finetuning.config.sections.controller import (
    HF_CONTROLS,
    METRIC_CLASSES,
    OPERATION_CLASSES,
    Component,
    TrainerController,
)
from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import KeyPath, ValidationIssue

RULE_FUNCTIONS = (
    *(
        "abs",
        "all",
        "any",
        "len",
        "round",
        "sum",
        "min",
        "max",
        "int",
        "float",
        "str",
        "bool",
        "list",
        "tuple",
        "dict",
        "set",
    ),
    *("rand", "randint", "math_trunc", "math_floor", "math_ceil", "math_sqrt", "math_isfinite"),
)
"""The functions that rules can call."""

MAX_BITS = 4096
_MAX_CHARACTERS = 1000
_MAX_DEPTH = 40
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Call, ast.keyword),
    *(ast.Name, ast.Constant, ast.Subscript, ast.Slice, ast.Attribute, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.comprehension, ast.expr_context),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)
_NAMED: dict[type[ast.AST], str] = {
    ast.Lambda: "a lambda",
    ast.NamedExpr: "an assignment (:=)",
    ast.JoinedStr: "an f-string",
    ast.Starred: "a star",
    ast.SetComp: "a set comprehension",
    ast.MatMult: "the operator @",
}
_NOT_BOOLEAN = (ast.BinOp, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.GeneratorExp, ast.DictComp)
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def check_controllers(section: TrainerController, path: KeyPath = ()) -> Iterator[ValidationIssue]:
    """Yield the issues of a trainer controller and its rules. `path` is the path of the section."""
    yield from _check_components(section.controller_metrics, METRIC_CLASSES, (*path, "controller_metrics"), "metric")
    yield from _check_components(section.operations, OPERATION_CLASSES, (*path, "operations"), "operation")
    for index, metric in enumerate(section.controller_metrics):
        yield from _check_metric_arguments(metric, (*path, "controller_metrics", index))
    for index, operation in enumerate(section.operations):
        yield from _check_log_format(operation, (*path, "operations", index, "arguments"))
    metrics = {metric.name: metric.class_name for metric in section.controller_metrics}
    classes = {HF_CONTROLS: "HFControls"} | {operation.name: operation.class_name for operation in section.operations}
    for index, controller in enumerate(section.controllers):
        here = (*path, "controllers", index)
        for message, hint in _rule_issues(controller.rule, metrics):
            yield ValidationIssue(
                (*here, "rule"), f'rule of controller "{controller.name}" is invalid: {message}', hint
            )
        for number, name in enumerate(controller.operations):
            yield from _check_operation(name, classes, controller.name, (*here, "operations", number))


def _check_components(
    components: Sequence[Component], classes: Mapping[str, object], path: KeyPath, what: str
) -> Iterator[ValidationIssue]:
    seen: set[str] = set()
    for index, component in enumerate(components):
        if component.name in seen:
            yield ValidationIssue((*path, index, "name"), f'"{component.name}" is also the name of another {what}')
        seen.add(component.name)
        if component.class_name not in classes and "." not in component.class_name:
            yield ValidationIssue(
                (*path, index, "class"),
                f'unknown {what} class "{component.class_name}"; one of: {", ".join(classes)}, or an import path.',
                did_you_mean(component.class_name, classes),
            )
        if what == "metric" and not component.name.isidentifier():
            yield ValidationIssue(
                (*path, index, "name"), f'"{component.name}" cannot be used in a rule: it is not an identifier'
            )


def _check_metric_arguments(metric: Component, path: KeyPath) -> Iterator[ValidationIssue]:
    arguments = METRIC_CLASSES.get(metric.class_name)
    if arguments is None:
        return
    for key, value in metric.arguments.items():
        where = (*path, "arguments", key)
        if key not in arguments:
            yield ValidationIssue(where, f'unknown argument of "{metric.class_name}".', did_you_mean(key, arguments))
        elif key == "window_size" and (isinstance(value, bool) or not isinstance(value, int) or value == 0):
            yield ValidationIssue(
                where, f"must be an integer other than 0; a negative one keeps all values (got {value})"
            )
        elif key == "source_event" and value not in ("on_evaluate", "on_predict"):
            yield ValidationIssue(where, f"must be on_evaluate or on_predict (got {value})")


def _check_log_format(operation: Component, path: KeyPath) -> Iterator[ValidationIssue]:
    if operation.class_name != "LogControl":
        return
    levels = ("debug", "info", "warning", "error", "critical")
    level = operation.arguments.get("log_level")
    text = operation.arguments.get("log_format")
    for key in operation.arguments.keys() - {"log_level", "log_format"}:
        hint = did_you_mean(key, ("log_level", "log_format"))
        yield ValidationIssue((*path, key), 'unknown argument of "LogControl".', hint)
    if str(level).lower() not in levels:
        yield ValidationIssue((*path, "log_level"), f"must be one of {', '.join(levels)} (got {level})")
    if not isinstance(text, str):
        yield ValidationIssue((*path, "log_format"), f"must be text (got {text})")
    elif "__" in text:
        yield ValidationIssue((*path, "log_format"), '"__" is not allowed')


def _check_operation(
    name: str, classes: Mapping[str, str], controller: str, path: KeyPath
) -> Iterator[ValidationIssue]:
    operation, _, action = name.partition(".")
    actions = OPERATION_CLASSES.get(classes.get(operation, ""))
    supported = {f"{prefix}.{method}" for prefix, kind in classes.items() for method in OPERATION_CLASSES.get(kind, ())}
    if operation not in classes or (actions is not None and action not in actions):
        yield ValidationIssue(
            path, f'invalid operation "{name}" for controller "{controller}".', did_you_mean(name, sorted(supported))
        )
    elif actions is None and not action.startswith("should_"):
        yield ValidationIssue(path, f'"{name}" is not an action: the names of actions begin with should_')


def _rule_issues(rule: str, metrics: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Yield what is wrong with a rule, with a hint."""
    if "__" in rule:
        yield '"__" is not allowed', None
        return
    try:
        tree = ast.parse(rule.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", None)
        yield (
            f"it is not an expression ({getattr(error, 'msg', error)}" + (f", column {column})" if column else ")"),
            None,
        )
        return
    if _depth(tree) > _MAX_DEPTH:
        yield "it is nested too deeply", None
        return
    local_names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if isinstance(tree.body, _NOT_BOOLEAN) or (
        isinstance(tree.body, ast.Constant) and not isinstance(tree.body.value, bool)
    ):
        yield "it evaluates to a value, not to true or false", "Compare it with something."
    if isinstance(tree.body, ast.Name) and tree.body.id in metrics:
        yield "it evaluates to a value, not to true or false", "Compare it with something."
    for node in ast.walk(tree):
        yield from _node_issues(node, metrics, local_names)


def _node_issues(node: ast.AST, metrics: Mapping[str, str], local_names: set[str]) -> Iterator[tuple[str, str | None]]:
    if not isinstance(node, _ALLOWED) or type(node) in _NAMED:
        yield f"{_NAMED.get(type(node), type(node).__name__)} is not allowed", None
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in RULE_FUNCTIONS:
        yield f'unknown function "{node.func.id}".', did_you_mean(node.func.id, RULE_FUNCTIONS)
    elif isinstance(node, ast.Call) and not isinstance(node.func, ast.Name | ast.Attribute):
        yield "only functions can be called", None
    elif (
        isinstance(node, ast.Name)
        and node.id not in metrics
        and node.id not in local_names
        and node.id not in RULE_FUNCTIONS
    ):
        yield f'"{node.id}" is not defined.', did_you_mean(node.id, metrics)
    elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
        yield f'"{node.attr}" is not allowed', None
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > _MAX_CHARACTERS:
        yield f"a text of {len(node.value):,} characters is too long", None
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and is_huge_power(*_constants(node)):
        yield f"{ast.unparse(node)} is too large", None
    elif isinstance(node, ast.Compare) and any(isinstance(operator, _ORDER) for operator in node.ops):
        for name in (operand.id for operand in (node.left, *node.comparators) if isinstance(operand, ast.Name)):
            if metrics.get(name) in METRIC_CLASSES:
                subscript = '["loss"]' if metrics[name] == "Loss" else '["…"]'
                yield f'"{name}" is a dictionary and cannot be compared.', f"Write {name}{subscript}."


def is_huge_power(base: object, exponent: object) -> bool:
    """Return whether base ** exponent has more than 4096 bits. False unless both are integers."""
    if not (isinstance(base, int) and isinstance(exponent, int)):
        return False
    return exponent > 0 and max(base.bit_length() - 1, abs(base) > 1) * exponent > MAX_BITS


def _constants(node: ast.BinOp) -> tuple[object, object]:
    def value(side: ast.expr) -> object:
        return side.value if isinstance(side, ast.Constant) else None

    return value(node.left), value(node.right)


def _depth(tree: ast.AST) -> int:
    deepest, pending = 0, [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        deepest = max(deepest, depth)
        pending += [(child, depth + 1) for child in ast.iter_child_nodes(node)]
    return deepest
