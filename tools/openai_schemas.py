"""What of OpenAI's OpenAPI document the tests need: `python -m tools.openai_schemas openapi.json COMMIT`.

The document is `openapi.json` of https://github.com/openai/openai-openapi at that commit (MIT). Of its 3 MB the schemas of the
answers that `localrun serve` gives are kept, with everything that they refer to and without what does not constrain a value
(descriptions, examples, defaults); of the requests' schemas the names of the fields. Written to `tests/server/schemas/openai.json`,
one schema a line, beside the document's licence.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = Any

TARGET = Path("tests/server/schemas/openai.json")

ANSWERS = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "ErrorResponse",
    "ListModelsResponse",
    "Model",
    "Response",
    "ResponseStreamEvent",
)

REQUESTS = ("CreateChatCompletionRequest", "CreateCompletionRequest", "CreateResponse")

NOT_RULES = ("default", "deprecated", "description", "example", "examples", "format", "title")
"""Keywords that a value can't break; so can none that begins with `x-`."""

_PREFIX = "#/components/schemas/"


def rules(schema: Json) -> Json:
    """A schema with nothing but its rules. What stands under `properties` are names, not keywords."""
    if isinstance(schema, list):
        return [rules(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: rules(each) for name, each in value.items()}
        elif key == "$ref":
            kept[key] = value.removeprefix(_PREFIX)
        elif key not in NOT_RULES and not key.startswith("x-"):
            kept[key] = rules(value)
    return kept


def references(schema: Json) -> Iterator[str]:
    """The names of the schemas that `schema`, one of `rules`, refers to."""
    if isinstance(schema, dict):
        if isinstance(name := schema.get("$ref"), str):
            yield name
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def closure(schemas: Mapping[str, Json], names: tuple[str, ...]) -> dict[str, Json]:
    """The rules of the named schemas and of all that they refer to, by name."""
    kept: dict[str, Json] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept[name] = rules(schemas[name])
            waiting += references(kept[name])
    return dict(sorted(kept.items()))


def field_names(schemas: Mapping[str, Json], schema: Mapping[str, Json]) -> set[str]:
    """The properties of an object that is put together from several."""
    names = set(schema.get("properties", ()))
    for part in schema.get("allOf", ()):
        names |= field_names(schemas, part)
    if "$ref" in schema:
        names |= field_names(schemas, schemas[schema["$ref"].removeprefix(_PREFIX)])
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="openapi.json")
    parser.add_argument("commit", help="the commit that it is from")
    args = parser.parse_args()
    schemas = json.loads(args.document.read_text("utf-8"))["components"]["schemas"]
    kept = closure(schemas, ANSWERS)
    head = {
        "source": "https://github.com/openai/openai-openapi",
        "commit": args.commit,
        "requests": {name: sorted(field_names(schemas, schemas[name])) for name in REQUESTS},
    }
    lines = [f"{json.dumps(name)}: {json.dumps(schema, separators=(',', ':'))}" for name, schema in kept.items()]
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "schemas": {\n' + ",\n".join(lines) + "\n}}\n"
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, "utf-8")
    print(f"{TARGET}: {len(kept)} schemas, {len(text):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
