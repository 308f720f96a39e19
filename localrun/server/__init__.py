"""An HTTP server for the OpenAI and Anthropic APIs. Knows HTTP and JSON, but nothing about experts.

One module per API turns requests into an `Ask` and events into that API's responses; shared parts are in separate modules.
"""
