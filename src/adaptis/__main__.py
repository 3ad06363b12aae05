"""`python -m adaptis`, which is also how torchrun starts it."""

from adaptis.cli import main

if __name__ == "__main__":
    main()
