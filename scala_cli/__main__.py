from scala_cli.cli.app import main

main()
