"""`attninject bench gpu`: one command that uses a card which is there for minutes only, most valuable figures first.

`course` runs the tasks of the parts by the clock and writes a JSON line as each ends; `table` reads them. The parts:
`truth` (tests marked gpu), `ceilings`, `blocks`, `networks`, `engine`. From the ground up: sheet · the parts · course,
table.
"""
