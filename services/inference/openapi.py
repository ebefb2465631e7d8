"""GET /openapi.json: what the service answers, for people and for generated clients. A test holds it against the service."""

from typing import Any

from services.inference.engine import OUTPUTS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
ERRORS = {
    400: "The request cannot be read; the text says what was found.",
    401: "A key is needed, or nobody has this one.",
    403: "The key is another tenant's.",
    404: "Not served; the text names what is.",
    405: "Another method is needed.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "A content coding that is not read.",
    429: "Over the tenant's quota; see Retry-After.",
    501: "Not done by this server.",
    503: "Too much work is waiting, or the model is not in memory; see Retry-After.",
    504: "The deadline (X-Timeout-Ms) passed first.",
}


def of(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


PREDICTION = of(**{"class": TEXT, "index": WHOLE, "probability": NUMBER})
EXPLANATION: Schema = {"type": "object", "properties": {"class": TEXT, "map": many(many(NUMBER)), "overlay": TEXT}}
CLASSIFIED = of(predictions=many(PREDICTION), unknown={"type": "boolean"})
CLASSIFIED["properties"]["explanation"] = EXPLANATION
WHO = {"tenant": TEXT, "version": TEXT, "alias": TEXT, "sha256": TEXT, "request_id": TEXT}
WHO_IS = {"tenant": TEXT, "alias": TEXT, "version": TEXT, "in_memory": {"type": "boolean"}}
TENSOR = of(name=TEXT, datatype=TEXT, shape=many(WHOLE))
REPOSITORY: Schema = {"type": "object", "additionalProperties": True}


def _one_or_many(answer: Schema) -> Schema:
    """A plain body is answered with one answer, a form with a list."""
    named = {**answer, "properties": {"name": TEXT, **answer["properties"]}}
    one, several = of(**WHO), of(**WHO, answers=many(named))
    one["properties"] |= answer["properties"]
    one["required"] += answer["required"]
    return {"oneOf": [one, several]}


def _answer(description: str, schema: Schema | None, media: str = "application/json") -> Schema:
    return {"description": description, "content": {media: {"schema": schema or {}}}}


def _operation(summary: str, schema: Schema | None, *errors: int, body: Schema | None = None, **more: Any) -> Schema:
    told: Schema = {"summary": summary, "responses": {"200": _answer("Done.", schema)}, **more}
    told["responses"] |= {str(code): {"$ref": f"#/components/responses/{code}"} for code in errors}
    if body is not None:
        told["requestBody"] = {"required": True, "content": body}
    return told


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


def document(version: str) -> Schema:
    """The whole description, OpenAPI 3.1."""
    name = _parameter("name", "path", TEXT, "Tenant, or tenant@alias")
    number = _parameter("version", "path", TEXT, "A version that is in memory or has an alias")
    milliseconds = {"type": "number", "exclusiveMinimum": 0}
    deadline = _parameter(
        "X-Timeout-Ms", "header", milliseconds, "Milliseconds after which the answer is of no use any more"
    )
    top = _parameter("top", "query", {"type": "integer", "minimum": 1}, "How many classes; default all")
    explain = _parameter("explain", "query", {"enum": ["0", "1", "overlay"]}, "Where in the picture the class was seen")
    pictures = {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
        },
    }
    inference = (400, 401, 403, 404, 408, 413, 415, 429, 503, 504)
    looking, body = (401, 403, 404, 503), (408, 413, 415)
    outputs = many({"type": "object", "properties": {"name": {"enum": list(OUTPUTS)}}, "required": ["name"]})
    infer_body = {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"id": TEXT, "inputs": many(TENSOR), "outputs": outputs},
                "required": ["inputs"],
            }
        }
    }
    infer = _operation(
        "Open Inference Protocol v2: tensors in, tensors out",
        of(model_name=TEXT, model_version=TEXT, outputs=many(TENSOR)),
        *inference,
        501,
        body=infer_body,
        parameters=[deadline],
    )
    metadata = _operation(
        "Tensors and card of a model",
        of(name=TEXT, versions=many(TEXT), platform=TEXT, parameters=REPOSITORY),
        *looking,
    )
    config = _operation("Triton's model configuration", of(name=TEXT, max_batch_size=WHOLE, input=many({})), *looking)
    stats = _operation("Counters since the version was loaded", of(model_stats=many(REPOSITORY)), *looking)
    model_ready = _operation("Whether the model is in memory", of(ready={"type": "boolean"}), *looking)
    json_object = {"application/json": {"schema": {"type": "object"}}}
    paths: dict[str, Schema] = {
        "/v1/{name}/classify": {
            "parameters": [name],
            "post": _operation(
                "Classes of a picture, or of each picture of a form",
                _one_or_many(CLASSIFIED),
                *inference,
                body=pictures,
                parameters=[top, explain, deadline],
            ),
        },
        "/v1/{name}/features": {
            "parameters": [name],
            "post": _operation(
                "The embedding of a picture, or of each picture of a form",
                _one_or_many(of(features=many(NUMBER))),
                *inference,
                body=pictures,
                parameters=[deadline],
            ),
        },
        "/v1/tenants": {
            "get": _operation("All that is served or refused", of(served=many(of(**WHO_IS)), refused=many({})), 401)
        },
        "/v2": {"get": _operation("The server", of(name=TEXT, version=TEXT, extensions=many(TEXT)))},
        "/v2/health/live": {"get": _operation("Alive", of(live={"type": "boolean"}))},
        "/v2/health/ready": {"get": _operation("Ready for requests", of(ready={"type": "boolean"}), 503)},
        "/v2/models/stats": {"get": stats},
        "/v2/repository/index": {
            "post": _operation(
                "All models", many(of(name=TEXT, version=TEXT, state=TEXT)), 400, 401, *body, body=json_object
            )
        },
        "/v2/repository/models/{name}/load": {
            "parameters": [name],
            "post": _operation("Load now, not with the first request", {}, 400, *looking, *body, 501, body=json_object),
        },
        "/v2/repository/models/{name}/unload": {
            "parameters": [name],
            "post": _operation("Free the memory until the next request", {}, *looking, body=json_object),
        },
        "/metrics": {
            "get": {
                "summary": "For Prometheus",
                "responses": {"200": _answer("Prometheus text format.", TEXT, "text/plain")},
            }
        },
    }
    for base, parameters in (("/v2/models/{name}", [name]), ("/v2/models/{name}/versions/{version}", [name, number])):
        paths[base] = {"parameters": parameters, "get": metadata}
        paths[f"{base}/ready"] = {"parameters": parameters, "get": model_ready}
        paths[f"{base}/config"] = {"parameters": parameters, "get": config}
        paths[f"{base}/stats"] = {"parameters": parameters, "get": stats}
        paths[f"{base}/infer"] = {"parameters": parameters, "post": infer}
    return {
        "openapi": "3.1.0",
        "info": {"title": "bit-serve", "version": version},
        "paths": paths,
        "components": {
            "responses": {str(code): _answer(text, of(error=TEXT)) for code, text in ERRORS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
