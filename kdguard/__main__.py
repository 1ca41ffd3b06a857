from kdguard.cli import main

main()
