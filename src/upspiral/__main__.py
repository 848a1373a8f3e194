"""`python -m upspiral` is the `upspiral` command."""

from upspiral.cli.main import main

if __name__ == "__main__":
    main()
