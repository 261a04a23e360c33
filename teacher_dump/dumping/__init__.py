"""Making a dump: its plan, the teacher's pass, repair, and what it will take. Nothing here knows a kind of knowledge."""
