"""The study of `rank_sites`: does the order that it gives foretell what a block gains when it is trained?

`python -m attninject.evidence.study run` trains what is not trained yet and adds it to the files of `results/`;
`report` writes `../RESULTS.md` from them. What is trained, in which order, and what is asked of it was written down
beforehand in `PROTOCOL.md`.

From the ground up: design · store · nets, splits · training · scoring, choosing · running · kendall · tables, report.
"""
