"""The server: an API that OpenAI's and Anthropic's clients use unchanged, and a page to chat in. ``app.make_app`` makes it."""
