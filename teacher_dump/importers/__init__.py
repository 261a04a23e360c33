"""Caches of teachers' predictions that other programs made, taken into a store as an ordinary dump.

    configuration  what `teacher-dump import` is asked to do
    layout         what a layout gives of a file: `Predictions`; one module for each layout
    rows           rows of columns, of Parquet, Arrow and JSON Lines files, as arrays
    knowledge      what the store keeps of predictions
    alignment      whether predictions stand beside the tokens that they predict
    asking         the same, asked of the teacher
    scan           all files read once, before anything is written
    run            `import_dump`

IMPORTS.md describes the layouts. A layout's module must not know the store, and nothing else the columns of a layout.
"""
