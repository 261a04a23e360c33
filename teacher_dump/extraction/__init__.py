"""What is taken from a teacher's predictions: one file for each kind of knowledge, and sampling."""
