"""Request and response bodies of the HTTP API, as pydantic models.

Requests are strict: numbers are numbers, unknown fields are refused, every number and list has a
bound, which the OpenAPI description shows. Fields have the names of OpenAI's API, or else of
vLLM's. Messages are validated by the processor; content.py describes them for OpenAPI.
(vLLM: entrypoints.openai.protocol.)
"""
