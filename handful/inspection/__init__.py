"""What experts do, beside chance: `inspect_model`, and what it is made of.

documents ─► collect: the routing of every token ─► load · repeats · following · pairs   (functions of routings)
                                               └──► ablation · likeness                  (the model run again)

routings     what was chosen for which token of which document, and the two halves of the documents
statistics   what beyond chance means: halves that agree, errors by document, false discoveries
load, repeats, following, pairs   the measures: pure functions of routings
subject      a model to be looked at: our decoder, or one of transformers by the plug-in
texts        files to documents with labels, and to windows of tokens
collect      runs a subject over windows
ablation     the loss without each expert; likeness: experts whose outputs are alike
run          all of it: a document of plain values; words: what it found, in sentences
page         report.html, with inspect.json beside it; tables: its tables and small charts
"""

from handful.inspection.run import inspect_model

__all__ = ["inspect_model"]
