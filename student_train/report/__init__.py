"""The HTML report of runs and evaluations, and its charts.

Nothing here measures, loads a model or imports torch: it shows what runs and evaluations have written.
"""
