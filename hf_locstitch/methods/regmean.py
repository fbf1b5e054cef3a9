"""RegMean: linears by regression to what each finetuned model's own gives, all else the plain mean. Source: Jin et al.,
Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv 2212.09849."""

from __future__ import annotations

from hf_locstitch.methods import Dense
from hf_locstitch.methods.average import combine

METHOD = Dense("RegMean", "https://arxiv.org/abs/2212.09849", combine, fitted=True)
