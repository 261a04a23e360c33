"""A dump: its options, its plan, its run, its repair, and an estimate of what it will take."""
