"""The HTTP server and its engine."""

import os

# Before torch loads its OpenMP: threads that wait for each other spin for some microseconds and
# then sleep. Its default is to spin on, and whenever anything else needs a core (the event loop, a
# client on the same machine), a step then takes many times as long. ACTIVE, for with PASSIVE they
# sleep at once where other threads have used OpenMP before, as the one that loads the model has.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
