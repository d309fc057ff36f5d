"""The checkpoint format and the definition of a switch, without an engine: imports neither transformers nor vLLM."""
