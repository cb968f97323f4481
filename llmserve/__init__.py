"""llmserve: one server that streams tokens from large language models and serves the models around them."""

__version__ = "0.1.0"
