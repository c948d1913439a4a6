"""Parts of `launch/train.py`; some serve `study.py`, `quickstart.py` and the benchmarks, too."""
