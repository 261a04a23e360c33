"""How good and how trustworthy a student is: metrics, multiple choice, results and their comparison.

Nothing here trains, changes a model or writes to a store; how results look on a page is the report's business.
"""
