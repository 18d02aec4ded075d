"""`python -m robustav`."""

from robustav.cli.main import main

if __name__ == "__main__":
    main()
