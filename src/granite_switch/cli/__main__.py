from granite_switch.cli import main

main()
