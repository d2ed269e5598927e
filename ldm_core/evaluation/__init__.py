"""The verifier, prompts and intervals."""
