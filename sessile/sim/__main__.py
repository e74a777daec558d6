"""`python -m sessile.sim`."""

from sessile.sim.run import main

if __name__ == "__main__":
    raise SystemExit(main())
