"""GET /openapi.json: what the service answers, for people and for generated clients. A test holds it against the service."""

from typing import Any

from services.inference.bodies import WINDOW
from services.inference.engine import OUTPUTS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
BYTES: Schema = {"type": "string", "format": "binary"}
BINARY = "application/octet-stream"
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
FORM = "Each part with a filename is a picture, whatever its name; there may be many"
BEFORE = (
    "Any request may also be answered by its connection: 400 where it is not HTTP, 431 where its header is too large, "
    "503 with Retry-After where all connections are taken."
)


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
TENSOR["properties"] |= {
    "data": {"type": "array", "description": "The values, flat or in rows, where they don't follow the JSON"},
    "parameters": {
        "type": "object",
        "properties": {"binary_data_size": WHOLE},
        "description": "binary_data_size: bytes of the tensor, which then follow the JSON in the tensors' order",
    },
}
INFERRED = of(model_name=TEXT, model_version=TEXT, outputs=many(TENSOR))
INFERRED["properties"] |= {"id": TEXT, "parameters": of(sha256=TEXT)}
REPOSITORY: Schema = {"type": "object", "additionalProperties": True}


def _header(schema: Schema, description: str, always: bool = False) -> Schema:
    return {"schema": schema, "description": description, "required": always}


CODED = {
    "Content-Encoding": _header({"enum": [c.decode() for c in WINDOW]}, "Of a long answer, as Accept-Encoding asks")
}
JSON_LENGTH = "Inference-Header-Content-Length"
ORIGIN = {  # of every answer of a version
    "X-Request-Id": _header(TEXT, "The request's own, or one that was drawn", always=True),
    "X-Model-Name": _header(TEXT, "The tenant", always=True),
    "X-Model-Version": _header(TEXT, "The version that answered", always=True),
    "X-Model-Sha256": _header(TEXT, "The sha256 of its file", always=True),
    "X-Model-Alias": _header(TEXT, "The alias that led to it, empty where none has it any more", always=True),
    "Server-Timing": _header(TEXT, "Milliseconds of each stage: load, queue, decode, infer, explain", always=True),
    **CODED,
}
SHAPE = _header({"type": "string", "pattern": "^[0-9]+,[0-9]+$"}, f"Of {BINARY}: pictures,numbers of each")
TENSORS_FOLLOW = _header(WHOLE | {"minimum": 1}, f"Of {BINARY}: bytes of JSON before the tensors")
LATER = {"Retry-After": _header(WHOLE | {"minimum": 1}, "Seconds until another try makes sense", always=True)}
ERROR_HEADERS = {
    401: {"WWW-Authenticate": _header({"const": "Bearer"}, "How the key is sent", always=True)},
    405: {"Allow": _header(TEXT, "The methods that are answered", always=True)},
    429: LATER,
    503: LATER,
}


def _one_or_many(answer: Schema) -> Schema:
    """A plain body is answered with one answer, a form with a list."""
    named = {**answer, "properties": {"name": TEXT, **answer["properties"]}}
    one, several = of(**WHO), of(**WHO, answers=many(named))
    one["properties"] |= answer["properties"]
    one["required"] += answer["required"]
    return {"oneOf": [one, several]}


def _answer(description: str, schema: Schema | None, media: str = "application/json") -> Schema:
    return {"description": description, "content": {media: {"schema": schema or {}}}}


def _error(code: int) -> Schema:
    of_inference = {name: header | {"required": False} for name, header in ORIGIN.items()}  # once a version was found
    return _answer(ERRORS[code], of(error=TEXT)) | {"headers": of_inference | ERROR_HEADERS.get(code, {})}


def _operation(summary: str, schema: Schema | None, *errors: int, body: Schema | None = None, **more: Any) -> Schema:
    told: Schema = {"summary": summary, "responses": {"200": _answer("Done.", schema)}, **more}
    told["responses"] |= {str(code): {"$ref": f"#/components/responses/{code}"} for code in errors}
    if body is not None:
        told["requestBody"] = {"required": True, "content": body}
    return told


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}


def _inference(
    summary: str, schema: Schema, *errors: int, binary: str = "", told: Schema | None = None, **more: Any
) -> Schema:
    """An operation whose answer names its version. binary: what the answer is as bytes; told: headers beside those of all."""
    made = _operation(summary, schema, 400, 401, 403, 404, 408, 413, 415, 429, 503, 504, *errors, **more)
    done = made["responses"]["200"]
    done["headers"] = ORIGIN | (told or {})
    if binary:
        done["content"][BINARY] = {"schema": BYTES | {"description": binary}}
    return made


def document(version: str) -> Schema:
    """The whole description, OpenAPI 3.1."""
    name = _parameter("name", "path", TEXT, "Tenant, or tenant@alias")
    number = _parameter("version", "path", TEXT, "A version that is in memory or has an alias")
    milliseconds = {"type": "number", "exclusiveMinimum": 0}
    deadline = _parameter(
        "X-Timeout-Ms", "header", milliseconds, "Milliseconds after which the answer is of no use any more"
    )
    request_id = _parameter("X-Request-Id", "header", TEXT, "What the answer and the log call this request")
    trace = _parameter("traceparent", "header", TEXT, "W3C Trace Context, whose trace the log names")
    coded = {"enum": ["identity", *(coding.decode() for coding in WINDOW)]}
    coding = _parameter("Content-Encoding", "header", coded, "How the body is compressed")
    accepted = _parameter("Accept-Encoding", "header", TEXT, "How a long answer may be compressed")
    asked = [deadline, request_id, trace, coding, accepted]
    top = _parameter("top", "query", {"type": "integer", "minimum": 1}, "How many classes; default all")
    explain = _parameter("explain", "query", {"enum": ["0", "1", "overlay"]}, "Where in the picture the class was seen")
    pictures = {
        BINARY: {"schema": BYTES},
        "multipart/form-data": {"schema": {"type": "object", "properties": {"file": BYTES}, "description": FORM}},
    }
    looking, body = (401, 403, 404, 503, 504), (408, 413)  # to look at a model loads it
    wish = {"binary_data": {"type": "boolean"}, "classification": {"type": "integer", "minimum": 0}}
    output = of(name={"enum": list(OUTPUTS)})
    output["properties"]["parameters"] = {"type": "object", "properties": wish}
    tensors = of(inputs=many(TENSOR))
    tensors["properties"] |= {
        "id": TEXT,
        "outputs": many(output),
        "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
    }
    json_length = _parameter(
        JSON_LENGTH,
        "header",
        WHOLE | {"minimum": 0},
        "Bytes of JSON before the tensors; 0: the body is one picture, answered in binary; without it all is JSON",
    )
    binary_body = f"JSON as in application/json, {JSON_LENGTH} bytes of it, and then the tensors; or one picture"
    infer = _inference(
        "Open Inference Protocol v2: tensors in, tensors out",
        INFERRED,
        501,
        binary="JSON as in application/json and then the tensors that were asked for with binary_data",
        told={JSON_LENGTH: TENSORS_FOLLOW},
        body={"application/json": {"schema": tensors}, BINARY: {"schema": BYTES | {"description": binary_body}}},
        parameters=[json_length, *asked],
    )
    metadata = _operation(
        "Tensors and card of a model",
        of(name=TEXT, versions=many(TEXT), platform=TEXT, parameters=REPOSITORY),
        *looking,
    )
    config = _operation("Triton's model configuration", of(name=TEXT, max_batch_size=WHOLE, input=many({})), *looking)
    stats = _operation("Counters since the version was loaded", of(model_stats=many(REPOSITORY)), *looking)
    model_ready = _operation("Whether the model is in memory", of(ready={"type": "boolean"}), *looking)
    ready = _operation("Ready for requests", of(ready={"type": "boolean"}))
    ready["responses"]["503"] = _answer("Not ready.", {"anyOf": [of(ready={"type": "boolean"}), of(error=TEXT)]})
    ready["responses"]["503"]["headers"] = {"Retry-After": LATER["Retry-After"] | {"required": False}}
    object_or_nothing = {"content": {"application/json": {"schema": {"type": "object"}}}}
    paths: dict[str, Schema] = {
        "/v1/{name}/classify": {
            "parameters": [name],
            "post": _inference(
                "Classes of a picture, or of each picture of a form",
                _one_or_many(CLASSIFIED),
                body=pictures,
                parameters=[top, explain, *asked],
            ),
        },
        "/v1/{name}/features": {
            "parameters": [name],
            "post": _inference(
                "The embedding of a picture, or of each picture of a form",
                _one_or_many(of(features=many(NUMBER))),
                binary=f"With `Accept: {BINARY}`: float32, little-endian, one picture after the other",
                told={"X-Shape": SHAPE},
                body=pictures,
                parameters=asked,
            ),
        },
        "/v1/tenants": {
            "get": _operation("All that is served or refused", of(served=many(of(**WHO_IS)), refused=many({})), 401)
        },
        "/v2": {"get": _operation("The server", of(name=TEXT, version=TEXT, extensions=many(TEXT)))},
        "/v2/health/live": {"get": _operation("Alive", of(live={"type": "boolean"}))},
        "/v2/health/ready": {"get": ready},
        "/v2/models/stats": {"get": stats},
        "/v2/repository/index": {
            "post": _operation(
                "All models",
                many(of(name=TEXT, version=TEXT, state=TEXT)),
                400,
                401,
                *body,
                requestBody=object_or_nothing,
            )
        },
        "/v2/repository/models/{name}/load": {
            "parameters": [name],
            "post": _operation(
                "Load now, not with the first request", {}, 400, *looking, *body, 501, requestBody=object_or_nothing
            ),
        },
        "/v2/repository/models/{name}/unload": {
            "parameters": [name],
            "post": _operation("Free the memory until the next request", {}, *looking, requestBody=object_or_nothing),
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
        "info": {"title": "bit-serve", "version": version, "description": BEFORE},
        "paths": paths,
        "components": {
            "responses": {str(code): _error(code) for code in ERRORS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
