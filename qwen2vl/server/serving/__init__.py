"""Handlers of the HTTP API: a request body in, a response body or an iterator of events out.

Each handler converts its body to messages and SamplingParams, prepares the prompt, submits it and
builds the response. Whatever can be refused is refused before a stream begins, so that it has an
HTTP status. Handlers know no sockets; generation.py is what they share.
(vLLM: OpenAIServingChat, OpenAIServingCompletion, OpenAIServingTokenization.)
"""
