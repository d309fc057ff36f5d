"""Compose models from a base and adapters, change them, and check them, as streams of files."""
