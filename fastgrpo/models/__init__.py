"""Hugging Face models: their head, what shards or adapts them, and how they are called."""
