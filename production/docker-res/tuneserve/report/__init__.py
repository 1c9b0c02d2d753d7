"""A version's report: `versions/<id>/report/index.html`, and as a model card `README.md` with its pictures.

facts.py    everything that is said, out of the version, its decision, its evidence and its answers
plots.py    pictures of some of it, as SVG
writing.py  both pages, by the templates `report.html` and `card.md`
"""
