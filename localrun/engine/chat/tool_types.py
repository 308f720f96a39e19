"""Extracts from tool schemas which parameters exist and which JSON types their values may have.

Only handles keywords that determine a type (`type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`); checking the rest of a schema
is up to the tool.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from localrun.engine.chat.messages import Json, ToolSchema

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
_ALTERNATIVES = ("anyOf", "oneOf")


@dataclass(frozen=True, slots=True)
class ToolTypes:
    """One tool's parameters.

    Attributes:
        types: JSON types by parameter, where the schema specifies them.
        names: all parameters; None if the schema does not list them, or allows others.
        required: parameters that a call must have.
    """

    types: Mapping[str, frozenset[str]]
    names: frozenset[str] | None
    required: frozenset[str]

    @classmethod
    def of(cls, tool: ToolSchema) -> ToolTypes:
        schema = tool.function.get("parameters")
        schema = schema if isinstance(schema, Mapping) else {}
        properties = schema.get("properties")
        known = {name: _types(item) for name, item in properties.items()} if isinstance(properties, Mapping) else {}
        required = schema.get("required")
        return cls(
            {name: types for name, types in known.items() if types != ALL_TYPES},
            frozenset(known) if isinstance(properties, Mapping) and not schema.get("additionalProperties") else None,
            frozenset(name for name in required if isinstance(name, str))
            if isinstance(required, list)
            else frozenset(),
        )

    def accepts(self, names: Iterable[str]) -> bool:
        """Whether a call with exactly these parameters is one that the schema has in mind."""
        given = set(names)
        return self.names is not None and given <= self.names and self.required <= given


def fits(value: Json, types: frozenset[str]) -> bool:
    """Whether a parsed JSON value is of one of the types."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types or ("integer" in types and value.is_integer())
        case str():
            return "string" in types
        case list():
            return "array" in types
        case _:
            return "object" in types


def _types(schema: Json, depth: int = 0) -> frozenset[str]:
    """Types that a schema allows; all if it does not specify any."""
    if not isinstance(schema, Mapping) or depth > 8:
        return ALL_TYPES
    allowed = ALL_TYPES
    kind = schema.get("type")
    if isinstance(kind, str):
        kind = [kind]
    if isinstance(kind, list) and kind and all(isinstance(item, str) and item in ALL_TYPES for item in kind):
        allowed = frozenset(kind)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        allowed &= frozenset(_type_of(value) for value in values)
    for word in _ALTERNATIVES:
        if isinstance(options := schema.get(word), list) and options:
            allowed &= frozenset().union(*(_types(option, depth + 1) for option in options))
    for option in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        allowed &= _types(option, depth + 1)
    return allowed or ALL_TYPES


def _type_of(value: Json) -> str:
    return next(
        (t for t in ("null", "boolean", "integer", "number", "string", "array") if fits(value, frozenset({t}))),
        "object",
    )
