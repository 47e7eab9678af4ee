"""`python -m fedkd`: the `fedkd` command."""

from fedkd.simulations.cli.start import main

if __name__ == "__main__":
    main()
