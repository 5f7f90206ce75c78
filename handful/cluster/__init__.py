"""A model's experts on many ranks, some of which may go: who is there, who has what, and what is done when one is not.

supervisor   starts processes, hears their beats, tells all who is there, starts again what died
rank         holds experts and computes rows for the front
keeper       in the front: which rank has which expert, what is missing, and what moves where
    start        all of it, from nothing to a server

        ┌── beats, who is there ──┬───────────┐
   supervisor                   rank 0      rank 1 …
        └────── front ───────────┴── rows ────┘
"""
