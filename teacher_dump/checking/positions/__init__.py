"""The check of the kind `positions`: a teacher's predictions held against those that a dump keeps."""
