"""The HTTP server and its engine."""

import os

# Before torch loads its OpenMP: threads that wait for each other spin for some microseconds and
# then sleep. Its default is to spin on, and whenever anything else needs a core (the event loop, a
# client on the same machine), a step then takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
