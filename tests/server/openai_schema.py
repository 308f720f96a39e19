"""OpenAI's published schemas as a check of answers: what is wrong with a value, place by place.

The keywords of JSON Schema that the document uses are few, and its schemas need reading that a plain validator does not give them:
alternatives are told apart by their `type`, so that a fault is named where it is; a property that the document does not know is a
fault although the schemas allow any; and alternatives overlap, so that `oneOf` is read as `anyOf`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Json = Any

PATH = Path(__file__).parent / "schemas" / "openai.json"

COMPOSED_OF = ("$ref", "allOf", "anyOf", "oneOf")

RULES = (
    *(
        "type",
        "nullable",
        "enum",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "pattern",
        "minItems",
        "maxItems",
        "items",
    ),
    *("properties", "required", "additionalProperties", "propertyNames", "maxProperties"),
)

PASSED_OVER = ("discriminator", "$recursiveRef", "$recursiveAnchor")
"""Found by `type` anyway; of filters for searches, which no answer has."""

KEYWORDS = frozenset((*COMPOSED_OF, *RULES, *PASSED_OVER))

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


@functools.cache
def document() -> Mapping[str, Json]:
    loaded: Mapping[str, Json] = json.loads(PATH.read_text("utf-8"))
    return loaded


def faults(value: Json, name: str) -> list[str]:
    """What keeps `value` from being what the document calls `name`, each with its place."""
    return _whole(value, {"$ref": name}, "$")


def _whole(value: Json, schema: Mapping[str, Json], where: str) -> list[str]:
    """The faults of a value, properties among them that no part of its schema knows."""
    found, known = _check(value, schema, where)
    if isinstance(value, dict) and known is not None:
        found += [f"{where}.{key}: is not in the document" for key in value if key not in known]
    return found


def _check(value: Json, schema: Mapping[str, Json], where: str) -> tuple[list[str], set[str] | None]:
    """(faults, the properties that the schema knows; None: it takes any)."""
    assert schema.keys() <= KEYWORDS, sorted(schema.keys() - KEYWORDS)
    if value is None and schema.get("nullable"):
        return [], set()
    found = _own_faults(value, schema, where)
    known: set[str] | None = set(schema.get("properties", ()))
    if "additionalProperties" in schema or not _says_properties(schema):
        known = None
    parts = [*schema.get("allOf", ())]
    if "$ref" in schema:
        parts.append(document()["schemas"][schema["$ref"]])
    for part in parts:
        more, names = _check(value, part, where)
        found += more
        known = None if known is None or names is None else known | names
    for key in ("anyOf", "oneOf"):
        if key in schema:
            more, names = _one_of(value, schema[key], where)
            found += more
            known = None if known is None or names is None else known | names
    return found, known


def _says_properties(schema: Mapping[str, Json]) -> bool:
    """Whether the schema says of an object what is in it, itself or by its parts."""
    return bool(schema.get("properties")) or any(key in schema for key in COMPOSED_OF)


def _own_faults(value: Json, schema: Mapping[str, Json], where: str) -> list[str]:
    """What the schema itself forbids, without the schemas that it is put together from."""
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{where}: {value!r:.60} is no {' or '.join(kinds)}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r:.60} is none of {schema['enum']}")
    if isinstance(value, str):
        found += _bounds(len(value), schema, ("minLength", "maxLength"), where)
        if "pattern" in schema and re.search(schema["pattern"], value) is None:
            found.append(f"{where}: {value!r:.60} does not match {schema['pattern']}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found += _bounds(value, schema, ("minimum", "maximum"), where)
    elif isinstance(value, list):
        found += _bounds(len(value), schema, ("minItems", "maxItems"), where)
        for i, each in enumerate(value):
            found += _whole(each, schema.get("items", {}), f"{where}[{i}]")
    elif isinstance(value, dict):
        found += _object_faults(value, schema, where)
    return found


def _object_faults(value: Mapping[str, Json], schema: Mapping[str, Json], where: str) -> list[str]:
    found = [f"{where}.{key}: is missing" for key in schema.get("required", ()) if key not in value]
    found += _bounds(len(value), schema, ("", "maxProperties"), where)
    properties: Mapping[str, Json] = schema.get("properties", {})
    others = schema.get("additionalProperties", {})
    for key, each in value.items():
        if key in properties:
            found += _whole(each, properties[key], f"{where}.{key}")
        elif others is False:
            found.append(f"{where}.{key}: is not allowed")
        elif isinstance(others, Mapping):
            found += _whole(each, others, f"{where}.{key}")
        found += _whole(key, schema.get("propertyNames", {}), f"{where}: the name {key}")
    return found


def _one_of(value: Json, ways: Sequence[Mapping[str, Json]], where: str) -> tuple[list[str], set[str] | None]:
    """The faults under the alternative that fits best, and the properties that those without faults know."""
    possible = _of_its_type(value, ways)
    results = [(_whole(value, way, where), way) for way in possible]
    right = [way for found, way in results if not found]
    if not right:
        return min((found for found, _ in results), key=len, default=[f"{where}: no alternative fits"]), None
    known: set[str] | None = set()
    for way in right:
        names = _check(value, way, where)[1]
        known = None if known is None or names is None else known | names
    return [], known


def _of_its_type(value: Json, ways: Sequence[Mapping[str, Json]]) -> Sequence[Mapping[str, Json]]:
    """The alternatives whose `type` property says what the value's says; all of them if that decides nothing."""
    kind = value.get("type") if isinstance(value, dict) else None
    named = [way for way in ways if kind is not None and kind in _named_types(way)]
    return named or ways


def _named_types(schema: Mapping[str, Json]) -> Iterable[Json]:
    """What an object of this schema may have as its `type`."""
    yield from schema.get("properties", {}).get("type", {}).get("enum", ())
    if "$ref" in schema:
        yield from _named_types(document()["schemas"][schema["$ref"]])
    for key in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(key, ()):
            yield from _named_types(part)


def _is(value: Json, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _bounds(size: float, schema: Mapping[str, Json], names: tuple[str, str], where: str) -> list[str]:
    least, most = (schema.get(name) for name in names)
    too_small, too_large = least is not None and size < least, most is not None and size > most
    return [f"{where}: {size} is not from {least} to {most}"] if too_small or too_large else []
