"""A value for a JSON schema: deterministic, small, and valid for the keywords that models are asked to follow."""

from __future__ import annotations

import math
from typing import Any

MAX_DEPTH = 6
_FORMATS = {
    "date": "2024-01-01",
    "date-time": "2024-01-01T00:00:00Z",
    "time": "00:00:00Z",
    "duration": "P1D",
    "email": "user@example.com",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "127.0.0.1",
}


def sample(schema: Any, name: str = "value", suffix: str = "") -> Any:
    """A value that satisfies `schema`.

    Enums and Literals give their first value, numbers 1 moved into their bounds, booleans True, strings a short text
    that carries `name` (of the property) and `suffix`. `pattern` is not followed.
    """
    return _sample(schema, schema if isinstance(schema, dict) else {}, name, suffix, 0)


def _sample(schema: Any, root: dict[str, Any], name: str, suffix: str, depth: int) -> Any:
    if depth > 10 * MAX_DEPTH:
        return None
    if not isinstance(schema, dict):
        return f"{name} text{suffix}"
    if "$ref" in schema:
        return _sample(_resolve(schema["$ref"], root), root, name, suffix, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if schema.get("allOf"):
        merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = _resolve(part["$ref"], root) if "$ref" in part else part
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged = {**merged, **part, **({"properties": properties, "required": required} if properties else {})}
        return _sample(merged, root, name, suffix, depth + 1)
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return _sample(_shallowest(options, depth), root, name, suffix, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((k for k in kind if k != "null"), "null") if depth < MAX_DEPTH else kind[-1]
    if kind == "object" or (kind is None and "properties" in schema):
        return _object(schema, root, suffix, depth)
    if kind == "array":
        return _array(schema, root, name, suffix, depth)
    if kind in ("integer", "number"):
        return _number(schema, whole=kind == "integer")
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    return _string(schema, name, suffix)


def _resolve(ref: str, root: dict[str, Any]) -> Any:
    node: Any = root
    for part in ref.removeprefix("#").strip("/").split("/"):
        if part:
            node = node.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(node, dict) else {}
    return node


def _shallowest(options: list[Any], depth: int) -> Any:
    """The first option; deep inside a recursive schema the first that does not refer on."""
    if depth < MAX_DEPTH:
        return next((o for o in options if not (isinstance(o, dict) and o.get("type") == "null")), options[0])
    return next((o for o in options if isinstance(o, dict) and o.get("type") == "null"), options[-1])


def _object(schema: dict[str, Any], root: dict[str, Any], suffix: str, depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    wanted = properties if depth < MAX_DEPTH else {k: v for k, v in properties.items() if k in required}
    return {key: _sample(part, root, key, suffix, depth + 1) for key, part in wanted.items()}


def _array(schema: dict[str, Any], root: dict[str, Any], name: str, suffix: str, depth: int) -> list[Any]:
    prefix = schema.get("prefixItems") or []
    values = [_sample(part, root, name, suffix, depth + 1) for part in prefix]
    least = schema.get("minItems", 0 if prefix or depth >= MAX_DEPTH else 1)
    most = schema.get("maxItems", max(least, len(values), 1))
    while len(values) < min(least, most):
        extra = f"{suffix} {len(values) + 1}" if values else suffix
        values.append(_sample(schema.get("items", {}), root, name, extra, depth + 1))
    return values


def _number(schema: dict[str, Any], *, whole: bool) -> int | float:
    step = schema.get("multipleOf") or (1 if whole else 0)
    low = schema.get("minimum", -math.inf)
    high = schema.get("maximum", math.inf)
    gap = step or 1e-3
    if isinstance(schema.get("exclusiveMinimum"), (int, float)):
        low = max(low, schema["exclusiveMinimum"] + gap)
    if isinstance(schema.get("exclusiveMaximum"), (int, float)):
        high = min(high, schema["exclusiveMaximum"] - gap)
    value = min(max(1 if whole else 1.0, low), high)
    if step:
        stepped = math.ceil(value / step) * step
        value = stepped if stepped <= high else math.floor(value / step) * step
    return int(value) if whole else float(value)


def _string(schema: dict[str, Any], name: str, suffix: str) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    text = f"{name} text{suffix}"
    least = schema.get("minLength", 0)
    if len(text) < least:
        text = text.ljust(least, ".")
    return text[: schema["maxLength"]] if "maxLength" in schema else text
