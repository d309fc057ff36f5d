"""`python -m granite_switch.cli`."""

from granite_switch.cli import main

main()
