"""Locustfiles, one to a question. Each runs alone: `locust -f loadtest/scenarios/hold.py --host http://…`."""
