"""Anthropic's Messages API over the same engine: bodies, requests, replies, routes."""
