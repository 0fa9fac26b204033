"""The mission: preflight, plan, both sides, convergence, handoff, recovery, receipt."""
