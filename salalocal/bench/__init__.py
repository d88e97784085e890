"""How fast a model reads and writes at which depth, beside what the machine could do; for the `bench` command.

run        opens what is measured, walks, measures the machine's ceilings: a BenchReport
subject    what can be walked: a model behind an Engine; its weights stored, or random of the released shape
dense      the baseline: a model with full attention in every layer, in bf16
walk       one growing state through all depths
work       FLOP and bytes that a stretch of tokens cannot do without, counted from the shape
ceilings   what the machine gives: reading, copying, multiplying
cards      what other cards promise: projections
chart      a drawing of it, as SVG or PNG
"""
