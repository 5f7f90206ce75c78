"""The words of the pages that travel alone (`report.html`), with what they mean: sentences of docs/glossary.md."""

from __future__ import annotations

__all__ = ["TERMS"]

TERMS = {
    "token": "a piece of text with a number in the model's vocabulary. Models read and write tokens.",
    "expert": "a feed-forward network (gate, up, down), one of E in a layer. It is a region of parameters, not a "
    "topic.",
    "router": "the learned linear map that scores the experts for a token.",
    "score": "what a router gives an expert for a token: the softmax or the sigmoid of its logits.",
    "weight": "what a chosen expert's output is multiplied by, made from its score.",
    "blend": "the sum of these products, which is the layer's output.",
    "shared expert": "an expert that every token uses, beside the routed ones.",
    "active parameters": "those that one token uses.",
    "total parameters": "those that memory must hold.",
    "twin": "a dense model matched to an MoE. dense-active has its active, dense-total its total parameters.",
    "load": "the share of the assignments that each expert got; even is 1/E.",
    "MaxVio": "(largest load − mean load) / mean load; 0 is even.",
    "dead expert": "one whose load is below 1 % of an even share.",
    "collapse": "the router keeps choosing the same few experts",
    "balance loss": "a term of the training loss that keeps the load even.",
    "stability": "the share of the choices of one held-out text that two evaluations of a training have in common.",
    "co-activation": "how often two experts are chosen by the same token.",
    "ablation": "switching an expert off to see what it costs the loss.",
    "held-out text": "text that no training step sees, by which losses are judged.",
    "spread": "the highest result over seeds minus the lowest.",
    "bits per byte": "the loss by bytes of text instead of tokens; compares between tokenizers",
    "FLOP": "one floating-point operation; a multiply-add is two.",
}
