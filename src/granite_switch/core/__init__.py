"""The format and its meaning, without any engine: imports neither transformers nor vLLM."""
