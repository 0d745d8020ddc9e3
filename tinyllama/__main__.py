"""`python -m tinyllama` is `tinyllama`."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())
