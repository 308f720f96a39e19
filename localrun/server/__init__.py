"""An HTTP server that speaks OpenAI's and Anthropic's APIs: knows HTTP and JSON, and nothing about experts.

One module per API turns requests into an `Ask` and events into that API's answers; what they share has modules of its own.
"""
