"""`python -m conclave.orchestrator.cli`: the same as the script `conclave`, for jobs."""

from . import main

main()
