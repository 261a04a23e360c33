"""The HTML report of runs and evaluations, and its charts."""
