"""OpenAI's Responses API over the same engine: bodies, requests, replies, the store of responses, routes."""
