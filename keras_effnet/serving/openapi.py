"""The service's interface, as OpenAPI 3.1."""

from typing import Any

from keras_effnet import __version__
from keras_effnet.serving.bodies import FIELD
from keras_effnet.serving.formats import REFUSED
from keras_effnet.serving.limits import Limits

_IMAGE = {"type": "string", "contentMediaType": "image/*"}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_CLASS = {
    "type": "object",
    "required": ["class_id", "name", "probability"],
    "properties": {
        "class_id": {"type": "integer", "minimum": 0},
        "wnid": {"type": "string", "description": "The WordNet id, of ImageNet's classes."},
        "name": {"type": "string"},
        "probability": {"type": "number", "description": "All bits of the float32 value."},
    },
}
_PREDICTIONS = {
    "type": "object",
    "required": ["predictions"],
    "properties": {
        "predictions": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Class"},
            "description": "The most likely classes, most likely first.",
        }
    },
}
_ANSWER = {
    "type": "object",
    "required": ["model", "images"],
    "properties": {
        "model": {"type": "string"},
        "images": {
            "type": "array",
            "description": "An item per image of the request, in its order.",
            "items": {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Predictions", "Error")]},
        },
    },
}
_SCHEMAS = {"Class": _CLASS, "Predictions": _PREDICTIONS, "Error": _ERROR, "Answer": _ANSWER}


def document(limits: Limits, top: int, model: str) -> dict[str, Any]:
    """Returns the service's interface.

    Args:
        limits: `Limits`.
        top: Integer. Classes per image, unless the request says otherwise.
        model: String. The model's name.

    Returns:
        Dict, as JSON in OpenAPI 3.1.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"keras_effnet: {model}",
            "version": __version__,
            "description": "Classifies images. Names and paths in a request are never opened.",
        },
        "paths": {
            "/predict": {"post": _predict(limits, top)},
            "/healthz": {
                "get": _get("Whether the service takes images.", "application/json")
                | {"responses": _answers({200: "It takes images.", 503: "It is draining."}, {"type": "object"})}
            },
            "/metadata": {"get": _get("The model: class names, crop, runtime; and the limits.", "application/json")},
            "/metrics": {"get": _get("Numbers for Prometheus.", "text/plain")},
            "/openapi.json": {"get": _get("This document.", "application/json")},
            "/docs": {"get": _get("This document as a page.", "text/html")},
        },
        "components": {"schemas": _SCHEMAS},
    }


def _predict(limits: Limits, top: int) -> dict[str, Any]:
    images = {"type": "array", "minItems": 1, "maxItems": limits.images}
    base64 = images | {"items": {"type": "string", "contentEncoding": "base64"}}
    bodies = {
        "image/*": _IMAGE,
        "application/octet-stream": _IMAGE,
        "multipart/form-data": _object(FIELD, images | {"items": _IMAGE}),
        "application/json": _object("images", base64),
    }
    refused = {
        400: "The request is not what its Content-Type says, has no image, or top is out of its range.",
        403: "The request is of another web page, or for a name that is not this machine's.",
        408: f"The request was not received within {limits.timeout:g} seconds.",
        413: f"More than {limits.bytes:,} bytes or {limits.images} images.",
        431: "The headers are too large.",
        500: "The model or the service failed: its log tells why.",
        503: "The queue is full, the answer took too long, or the service is ending. Try again after Retry-After.",
    }
    answer = {"$ref": "#/components/schemas/Answer"}
    told = f"Some images have an error in their place: damaged, of more than {limits.pixels:,} pixels, or one of "
    told += ", ".join(REFUSED)
    return {
        "summary": "Classify images.",
        "parameters": [
            {
                "name": "top",
                "in": "query",
                "description": "Classes per image.",
                "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": top},
            }
        ],
        "requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in bodies.items()}},
        "responses": _answers({200: "Predictions for all images.", 422: told}, answer)
        | _answers(refused, {"$ref": "#/components/schemas/Error"}),
    }


def _object(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "additionalProperties": False, "properties": {name: schema}}


def _get(summary: str, kind: str) -> dict[str, Any]:
    schema = {"type": "object" if kind == "application/json" else "string"}
    return {"summary": summary, "responses": _answers({200: "As described."}, schema, kind)}


def _answers(told: dict[int, str], schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    content = {kind: {"schema": schema}}
    return {str(status): {"description": text, "content": content} for status, text in told.items()}
