"""From published versions of latent stores to training batches: plan, row groups, texts, stream.

```
index.py        what a version's footers tell: the units, rows of one bucket in one row group
mixture.py      an epoch: which stretches of which units, in which order
lanes.py        its batches dealt to lanes, whatever the number of workers
windows.py      a lane's stretches in windows, shuffled within each
loading.py      windows read ahead of their use
stream.py       the reader: a global step -> batches
```
"""
