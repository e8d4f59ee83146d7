"""The HTTP response of an APIError, in OpenAI's form, with the headers that belong to its status.

Used by middleware and routes, so that every refusal has the same form:
{"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import json
import math

from starlette.responses import Response

from qwen2vl.server.errors import APIError

__all__ = ["error_response"]


def error_response(error: APIError) -> Response:
    """Return the response that tells a client of an error."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = json.dumps(error.to_body(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(body, error.status, headers, media_type="application/json")
