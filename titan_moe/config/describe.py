"""The configuration as text: the options in `titan-moe train --help`, the JSON schema, and a run's `config.toml`.

python -m titan_moe.config.describe > titan_moe/config/schema.json      updates the schema that the package ships
"""

import json
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan_moe.config.load import fields, is_table
from titan_moe.config.tables import config_class


def options_help(width: int = 110, table: type[BaseModel] | None = None) -> str:
    """All options by table, each with its default, type and meaning.

    table: the class of the configuration; None: that of `titan-moe train`."""
    lines: list[str] = []
    for key, field in fields(table):
        if is_table(field.annotation):
            lines.append(f"\n[{key}]  {field.annotation.__doc__ or ''}")
        else:
            default = json.dumps(field.get_default(call_default_factory=True))
            lines.append(f"  --{key}={default}  ({type_name(field)})")
            lines += textwrap.wrap(field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def type_name(field: FieldInfo) -> str:
    """A field's type with its bounds, for example "int, >= 1" or '"softmax" | "sigmoid"'."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Literal, Union, UnionType):
        return " | ".join(choices(annotation))
    name = annotation.__name__
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)  # Annotated[int, ...] for a bounded number
        name = f"list[{getattr(item, '__origin__', item).__name__}]"
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{bounds[k]} {getattr(m, k)}" for m in field.metadata for k in bounds if hasattr(m, k)]
    return ", ".join([name, *limits])


def choices(annotation: Any) -> Iterator[str]:
    """The types and values of a union or a Literal."""
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield json.dumps(part)
        elif get_origin(part) is Literal:
            yield from choices(part)
        else:
            yield getattr(part, "__name__", str(part))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file, with its `extends` key."""
    schema = config_class().model_json_schema()
    extends = {
        "description": "Files that this one extends, relative to it; later wins.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"extends": extends} | schema["properties"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def to_toml(config: BaseModel) -> str:
    """All keys of a configuration with their values, as TOML that `load_config` reads."""
    return tomli_w.dumps(config.model_dump())


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
