"""Text to token files: tokenizers, sources, preparation, and every layout of token files."""
