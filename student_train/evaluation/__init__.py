"""How good and how trustworthy a student is: metrics, multiple choice, results and their comparison."""
