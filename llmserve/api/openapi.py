"""What the OpenAPI document says of bodies that are read by hand. Knows no route."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def request_body(path: str, *models: type[BaseModel]) -> dict[str, Any]:
    """An operation's `requestBody`. Nested models are defined inside it and referred to from the document's root."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    if len(models) == 1:
        schema = models[0].model_json_schema(ref_template=place + "/$defs/{model}")
    else:
        schema = {
            "oneOf": [
                model.model_json_schema(ref_template=f"{place}/oneOf/{position}/$defs/{{model}}")
                for position, model in enumerate(models)
            ]
        }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
