"""The service's interface as a page: from its OpenAPI document, without scripts and without other hosts."""

import json
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#22304a}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}"
    "pre{background:#eef2f8;padding:1rem;overflow:auto}h2{border-top:1px solid #8b97ab;padding-top:1rem}"
)


def page(document: dict[str, Any]) -> str:
    """Returns an HTML page.

    Args:
        document: Dict, see `openapi.document()`.

    Returns:
        String.
    """
    info = document["info"]
    parts = [f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])} Version {escape(info['version'])}.</p>"]
    for path, methods in document["paths"].items():
        for method, told in methods.items():
            parts.append(
                f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(told['summary'])}</p>"
            )
            parts += _request(told)
            parts.append(_table("Answers", {status: one["description"] for status, one in told["responses"].items()}))
    schemas = escape(json.dumps(document["components"]["schemas"], indent=2))
    parts.append(f'<h2>Schemas</h2><pre>{schemas}</pre><p>All of it: <a href="openapi.json">openapi.json</a>.</p>')
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"


def _request(told: dict[str, Any]) -> list[str]:
    parts = []
    if "parameters" in told:
        rows = {one["name"]: f"{one['description']} {json.dumps(one['schema'])}" for one in told["parameters"]}
        parts.append(_table("Parameters", rows))
    if "requestBody" in told:
        content = told["requestBody"]["content"]
        parts.append(_table("Bodies", {kind: json.dumps(one["schema"]) for kind, one in content.items()}))
    return parts


def _table(title: str, rows: dict[str, str]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(text)}</td></tr>" for name, text in rows.items()
    )
    return f"<table><tr><th>{title}</th><th></th></tr>{cells}</table>"
