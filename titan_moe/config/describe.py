"""What the tables say of themselves: `--help`, the JSON schema, and the `config.toml` of a run directory.

python -m titan_moe.config.describe > titan_moe/config/schema.json      writes the schema that the package ships
"""

import json
import textwrap
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan_moe.config.tables import Config, config_class


def options_help(width: int = 110) -> str:
    """Every option with type, default and meaning, table by table."""
    lines: list[str] = []
    for prefix, table in tables(config_class()):
        lines.append(f"\n[{prefix}]  {table.__doc__ or ''}")
        for name, field in table.model_fields.items():
            if is_table(field.annotation):
                continue
            default = json.dumps(field.get_default(call_default_factory=True))
            lines.append(f"  --{prefix}.{name}={default}  ({type_name(field)})")
            lines += textwrap.wrap(field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def tables(table: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in table.model_fields.items():
        annotation: Any = field.annotation
        if is_table(annotation):
            yield f"{prefix}{name}", annotation
            yield from tables(annotation, f"{prefix}{name}.")


def is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_name(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(annotation))
    if isinstance(annotation, UnionType):
        return " | ".join(getattr(part, "__name__", str(part)) for part in get_args(annotation))
    name = str(annotation) if get_args(annotation) else annotation.__name__
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{bounds[k]} {getattr(m, k)}" for m in field.metadata for k in bounds if hasattr(m, k)]
    return ", ".join([name, *limits])


def json_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a configuration file, `extends` included."""
    schema = config_class().model_json_schema()
    extends = {
        "description": "Files that this one extends, relative to it; later wins.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"extends": extends} | schema["properties"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def to_toml(config: Config) -> str:
    """The whole configuration, every key with its value, as TOML that `load_config` reads back."""
    return tomli_w.dumps(config.model_dump())


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
