"""`python -m attninject` is the console script `attninject`."""

from attninject.cli import main

raise SystemExit(main())
