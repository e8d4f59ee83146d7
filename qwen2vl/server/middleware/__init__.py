"""ASGI middleware: request context and access control; reading and parsing of request bodies.

Pure ASGI callables, because starlette's BaseHTTPMiddleware starts a task for each request and hides
the client's disconnect from the handlers. Order, outermost first: RequestContextMiddleware (id,
access log, metrics), AccessControlMiddleware (Host, Origin, API key). Then a route (routing.py)
calls BodyReader (content type, size, time), `parse_json` and, for a refusal, `validation_error`.
"""
